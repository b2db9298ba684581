"""``UNetModel`` of openai/guided-diffusion and openai/consistency_models -> :class:`zoo.nn.unet2d.UNet2D`.

The files hold no configuration.  What their shapes do not tell (width of a head, order of queries, keys and values) is
taken from the published model whose shapes they have; other models need ``--config FILE`` with the arguments of the
original ``create_model`` in JSON: ``{"image_size": 64, "num_head_channels": 64, "use_new_attention_order": true}``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, depth
from checkpoints.importers.rules import LINEAR, Reshape, Rule, Split, Transpose, conv2d, embedding, linear, norm
from zoo.nn.unet2d import UNet2D, UNet2DConfig

PUBLISHED = (
    UNet2DConfig.adm_64(), UNet2DConfig.adm_128(), UNet2DConfig.adm_256(), UNet2DConfig.adm_256(0),
    UNet2DConfig.adm_512(), UNet2DConfig.consistency_64(), UNet2DConfig.consistency_256(),
)  # fmt: skip
MULTIPLIERS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
"""What an empty ``channel_mult`` stands for."""
NETWORK = {
    "image_size", "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "num_heads",
    "num_head_channels", "num_heads_upsample", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order",
    "class_cond", "learn_sigma", "dropout", "norm_groups",
}  # fmt: skip
DIFFUSION = {
    "diffusion_steps", "noise_schedule", "timestep_respacing", "use_kl", "predict_xstart", "rescale_timesteps",
    "rescale_learned_sigmas", "use_checkpoint", "use_fp16", "sigma_min", "sigma_max", "weight_schedule", "distillation",
}  # fmt: skip
"""Arguments that do not change the network's forward pass."""
SHAPELESS = ("image_size", "head_width", "num_heads", "norm_groups", "dropout")


def walk(c: UNet2DConfig) -> Iterator[tuple[str, str, str, int]]:
    """(kind, place in the source, name in the module, channels) of every block."""
    resample = "block" if c.block_resample else "conv"
    n = 1
    for level, width in enumerate(c.widths):
        for i in range(c.num_blocks):
            yield "block", f"input_blocks.{n}.0", f"encoder{level}_block{i}", width
            if 2**level in c.attention_factors:
                yield "attention", f"input_blocks.{n}.1", f"encoder{level}_attention{i}", width
            n += 1
        if level < len(c.widths) - 1:
            place = f"input_blocks.{n}.0" + ("" if c.block_resample else ".op")
            yield resample, place, f"encoder{level}_down", width
            n += 1
    yield "block", "middle_block.0", "middle_block0", c.widths[-1]
    yield "attention", "middle_block.1", "middle_attention", c.widths[-1]
    yield "block", "middle_block.2", "middle_block1", c.widths[-1]
    n = 0
    for level, width in reversed(list(enumerate(c.widths))):
        for i in range(c.num_blocks + 1):
            yield "block", f"output_blocks.{n}.0", f"decoder{level}_block{i}", width
            attends = 2**level in c.attention_factors
            if attends:
                yield "attention", f"output_blocks.{n}.1", f"decoder{level}_attention{i}", width
            if level and i == c.num_blocks:
                place = f"output_blocks.{n}.{1 + attends}" + ("" if c.block_resample else ".conv")
                yield resample, place, f"decoder{level}_up", width
            n += 1


def rules(module: UNet2D) -> list[Rule]:
    """The table."""
    c = module.config
    table = [
        *linear("time_embed.0", "time/first"),
        *linear("time_embed.2", "time/second"),
        *embedding("label_emb", "label"),
        *conv2d("input_blocks.0.0", "conv_in"),
        *norm("out.0", "norm_out"),
        *conv2d("out.2", "conv_out"),
    ]
    for kind, source, target, width in walk(c):
        if kind == "conv":
            table += conv2d(source, target)
        elif kind == "attention":
            table += attention(source, target, width, c.heads(width), c.attention_order)
        else:
            table += norm(f"{source}.in_layers.0", f"{target}/norm1")
            table += conv2d(f"{source}.in_layers.2", f"{target}/conv1")
            table += linear(f"{source}.emb_layers.1", f"{target}/condition")
            table += norm(f"{source}.out_layers.0", f"{target}/norm2")
            table += conv2d(f"{source}.out_layers.3", f"{target}/conv2")
            table += conv2d(f"{source}.skip_connection", f"{target}/skip")
    return table


def attention(source: str, target: str, width: int, heads: int, order: str) -> list[Rule]:
    """Fused queries, keys and values, head by head ("legacy") or all queries first, and the projection back."""
    ones = (1, 1) if order == "flash" else (1,)
    flat = Reshape((-1, width, *ones), (-1, width))
    weight, bias = (flat, LINEAR, Split(1, 3)), (Split(0, 3),)
    if order == "legacy":
        each, side = (heads, 3, width // heads), (3, heads, width // heads)
        weight = (
            flat, Reshape((3 * width, width), (*each, width)), Transpose((1, 0, 2, 3)),
            Reshape((*side, width), (3 * width, width)), LINEAR, Split(1, 3),
        )  # fmt: skip
        bias = (Reshape((3 * width,), each), Transpose((1, 0, 2)), Reshape(side, (3 * width,)), Split(0, 3))
    parts = [f"{target}/attention/{part}" for part in ("query", "key", "value")]
    return [
        *norm(f"{source}.norm", f"{target}/norm"),
        Rule(f"{source}.qkv.weight", tuple(f"{p}/kernel" for p in parts), weight),
        Rule(f"{source}.qkv.bias", tuple(f"{p}/bias" for p in parts), bias),
        Rule(f"{source}.proj_out.weight", f"{target}/attention/out/kernel", (flat, LINEAR)),
        Rule(f"{source}.proj_out.bias", f"{target}/attention/out/bias"),
    ]


def told(shapes: Shapes) -> UNet2DConfig:
    """All that the shapes tell; the other fields are as in the 64 x 64 model."""
    last = depth(shapes, "output_blocks.{i}.")
    growing = [n for n in range(last) if _grows(shapes, n)]
    per_level = (growing[0] if growing else last - 1) + 1
    levels, blocks = last // per_level, per_level - 1
    firsts = [1 + level * per_level for level in range(levels)]
    if blocks < 1 or last % per_level or not all(f"input_blocks.{n}.0.out_layers.3.weight" in shapes for n in firsts):
        raise ImporterError(f"{last} output blocks, growing at {growing}, are no U-Net of equally deep levels")
    stem, head = shapes["input_blocks.0.0.weight"].shape, shapes["out.2.weight"].shape
    widths = tuple(shapes[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0] for n in firsts)
    return UNet2DConfig(
        in_channels=stem[1], out_channels=head[0], base_width=shapes["time_embed.0.weight"].shape[1], widths=widths,
        num_blocks=blocks,
        attention_factors=tuple(2**k for k, n in enumerate(firsts) if f"input_blocks.{n}.1.qkv.weight" in shapes),
        attention_order="flash" if len(shapes["middle_block.1.qkv.weight"].shape) == 4 else "new",
        num_classes=shapes["label_emb.weight"].shape[0] if "label_emb.weight" in shapes else 0,
        scale_shift=shapes["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * widths[-1],
        block_resample=levels == 1 or f"input_blocks.{per_level}.0.op.weight" not in shapes,
    )  # fmt: skip


def _grows(shapes: Shapes, n: int) -> bool:
    return any(f"output_blocks.{n}.{k}.{x}" in shapes for k in (1, 2) for x in ("conv.weight", "in_layers.2.weight"))


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> UNet2D:
    """From the shapes, and the original arguments or the published model of these shapes."""
    c = told(shapes)
    if config is None:
        for known in PUBLISHED:
            same = {k: getattr(known, k) for k in SHAPELESS}
            order = known.attention_order
            if (order == "flash") == (c.attention_order == "flash") and known == dataclasses.replace(
                c, attention_order=order, **same
            ):
                return UNet2D(known)
        raise ImporterError(
            f"these shapes (widths {c.widths}, {c.num_blocks} blocks, {c.num_classes} classes) are no published model, "
            "and do not tell the width of a head; give the original arguments (num_head_channels or num_heads, "
            "use_new_attention_order ...) as JSON with --config FILE"
        )
    return UNet2D(_with_arguments(c, config))


def _with_arguments(c: UNet2DConfig, config: Mapping[str, Any]) -> UNet2DConfig:
    if unknown := sorted(set(config) - NETWORK - DIFFUSION):
        raise ImporterError(f"config {', '.join(unknown)} is no argument of create_model; there are {sorted(NETWORK)}")
    size, per_head, heads = config.get("image_size"), config.get("num_head_channels", -1), config.get("num_heads")
    if size is None:
        raise ImporterError("config image_size is missing: attention_resolutions are counted from it")
    if per_head == -1 and heads is None:
        raise ImporterError("config num_head_channels and num_heads are missing: the shapes do not tell them")
    if per_head == -1 and config.get("num_heads_upsample", -1) not in (-1, heads):
        raise ImporterError(
            f"config num_heads_upsample = {config['num_heads_upsample']!r} is not supported; only -1 is"
        )
    order = "legacy" if c.attention_order == "new" and not config.get("use_new_attention_order") else c.attention_order
    made = dataclasses.replace(
        c, image_size=size, head_width=None if per_head == -1 else per_head, num_heads=heads or 4,
        attention_order=order, norm_groups=config.get("norm_groups", 32), dropout=float(config.get("dropout", 0.0)),
    )  # fmt: skip
    says = to_config(UNet2D(made))
    told_by_shapes = {"num_channels", "num_res_blocks", "use_scale_shift_norm", "class_cond", "resblock_updown"}
    checks = [(k, config[k], says[k]) for k in sorted(told_by_shapes & set(config))]
    if "channel_mult" in config:
        checks.append(("channel_mult", _widths(config["channel_mult"], size, c.base_width), c.widths))
    if "attention_resolutions" in config:
        wanted = sorted(size // int(r) for r in str(config["attention_resolutions"]).split(","))
        checks.append(
            ("attention_resolutions", [f for f in wanted if f < 2 ** len(c.widths)], sorted(c.attention_factors))
        )
    if "learn_sigma" in config:
        checks.append(("learn_sigma", (1 + bool(config["learn_sigma"])) * c.in_channels, c.out_channels))
    for key, said, seen in checks:
        if said != seen and not (key == "resblock_updown" and len(c.widths) == 1):
            raise ImporterError(f"config {key} = {config[key]!r} (that is, {said}), but the weights say {seen}")
    return made


def _widths(text: str, size: int, base: int) -> tuple[int, ...]:
    if not text and size not in MULTIPLIERS:
        raise ImporterError(f"config channel_mult is empty and image_size = {size} has no default one")
    return tuple(int(float(m) * base) for m in (text.split(",") if text else MULTIPLIERS[size]))


def to_config(module: UNet2D) -> dict[str, Any]:
    """The arguments of the original ``create_model``."""
    c = module.config
    default = tuple(int(m * c.base_width) for m in MULTIPLIERS.get(c.image_size, ()))
    return {
        "image_size": c.image_size, "num_channels": c.base_width, "num_res_blocks": c.num_blocks,
        "channel_mult": "" if default == c.widths else ",".join(f"{w / c.base_width:g}" for w in c.widths),
        "attention_resolutions": ",".join(str(c.image_size // f) for f in sorted(c.attention_factors)),
        "num_heads": c.num_heads, "num_head_channels": -1 if c.head_width is None else c.head_width,
        "num_heads_upsample": -1, "use_scale_shift_norm": c.scale_shift, "resblock_updown": c.block_resample,
        "use_new_attention_order": c.attention_order == "new", "class_cond": c.num_classes > 0,
        "learn_sigma": c.out_channels != c.in_channels, "dropout": c.dropout,
    } | ({} if c.norm_groups == 32 else {"norm_groups": c.norm_groups})  # fmt: skip


def preprocessing(config: Mapping[str, Any] | None, _: Any = None) -> dict[str, Any]:
    """Pixels in -1..1."""
    size = {"size": (config["image_size"],) * 2} if config and "image_size" in config else {}
    return {"mean": (0.5,) * 3, "std": (0.5,) * 3, **size}


LAYOUT = Layout(
    name="openai-unet",
    title="guided-diffusion and consistency_models U-Nets (ADM, EDM and consistency models; plain state dicts)",
    configure=configure,
    rules=rules,
    signature=(
        "time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.emb_layers.1.weight",
        "middle_block.1.qkv.weight", "output_blocks.0.0.in_layers.2.weight", "out.2.weight",
    ),
    to_config=to_config,
    preprocessing=preprocessing,
)  # fmt: skip
