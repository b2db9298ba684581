"""diffusers' ``AutoencoderKL`` (Stable Diffusion's and its like) -> :class:`zoo.nn.autoencoder_kl.AutoencoderKL`.

The attention in the middle goes by two sets of names: ``to_q ... to_out.0``, or ``query ... proj_attn`` in older files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, choose, depth, refuse
from checkpoints.importers.rules import Rule, conv2d, linear, norm
from zoo.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

ONLY = {"latents_mean": None, "latents_std": None}
# how the reference computes, not what
IDLE = {"force_upcast"}
READ = {
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "act_fn", "latent_channels", "norm_num_groups", "scaling_factor", "shift_factor",
    "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention",
}  # fmt: skip


def residual(source: str, target: str) -> list[Rule]:
    """``ResnetBlock2D`` without a condition."""
    return [
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *conv2d(f"{source}.conv1", f"{target}/conv1"),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *conv2d(f"{source}.conv2", f"{target}/conv2"),
        *conv2d(f"{source}.conv_shortcut", f"{target}/skip"),
    ]


def rules(module: AutoencoderKL) -> list[Rule]:
    """The table."""
    levels = len(module.config.widths)
    table = [*conv2d("quant_conv", "quant"), *conv2d("post_quant_conv", "post_quant")]
    for half in ("encoder", "decoder"):
        table += [
            *conv2d(f"{half}.conv_in", f"{half}/conv_in"),
            *norm(f"{half}.conv_norm_out", f"{half}/norm_out"),
            *conv2d(f"{half}.conv_out", f"{half}/conv_out"),
            *residual(f"{half}.mid_block.resnets.{{i}}", f"{half}/middle_block{{i}}"),
            *norm(f"{half}.mid_block.attentions.0.group_norm", f"{half}/middle_attention/norm"),
        ]
        new, old = ("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")
        for names in (new, old):
            for name, part in zip(names, ("query", "key", "value", "out"), strict=True):
                ours = f"{half}/middle_attention/attention/{part}"
                table += linear(f"{half}.mid_block.attentions.0.{name}", ours)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        table += residual(f"{down}.resnets.{{i}}", f"encoder/level{level}_block{{i}}")
        table += conv2d(f"{down}.downsamplers.0.conv", f"encoder/level{level}_down")
        table += residual(f"{up}.resnets.{{i}}", f"decoder/level{level}_block{{i}}")
        table += conv2d(f"{up}.upsamplers.0.conv", f"decoder/level{level}_up")
    return table


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> AutoencoderKL:
    """From config.json; without one, only Stable Diffusion's own shapes are known well enough."""
    if config is None:
        levels = range(depth(shapes, "encoder.down_blocks.{i}."))
        names = [f"encoder.down_blocks.{n}.resnets.0.conv2.weight" for n in levels]
        widths = tuple(shapes[n].shape[0] if n in shapes else None for n in names)
        known, latents = AutoencoderKLConfig.sd(), shapes["decoder.conv_in.weight"].shape[1]
        if widths != known.widths or latents != known.latent_channels:
            raise ImporterError(
                f"channels {widths} with {latents} latent ones are not Stable Diffusion's, and the shapes tell neither "
                "groups nor scaling factor; give its config.json with --config FILE"
            )
        return AutoencoderKL(known)
    if unknown := sorted(k for k in set(config) - set(ONLY) - IDLE - READ if not k.startswith("_")):
        raise ImporterError(f"config {', '.join(unknown)} is unknown for {LAYOUT.name}")
    refuse(config, **ONLY)
    choose(config, "act_fn", {"silu": None, "swish": None}, "silu")
    for key, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        for value in config.get(key, [only]):
            choose({key: value}, key, {only: None}, only)
    size = config.get("sample_size", 32)
    c = AutoencoderKLConfig(
        sample_size=size if isinstance(size, int) else max(size), in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3), latent_channels=config.get("latent_channels", 4),
        widths=tuple(config.get("block_out_channels", (64,))), num_blocks=config.get("layers_per_block", 1),
        scaling_factor=float(config.get("scaling_factor", 0.18215)),
        shift_factor=float(config.get("shift_factor") or 0),
        middle_attention=config.get("mid_block_add_attention", True),
        quant_conv=config.get("use_quant_conv", True), post_quant_conv=config.get("use_post_quant_conv", True),
        norm_groups=config.get("norm_num_groups", 32),
    )  # fmt: skip
    return AutoencoderKL(c)


def to_config(module: AutoencoderKL) -> dict[str, Any]:
    """config.json of the reference library."""
    c = module.config
    return {
        "_class_name": "AutoencoderKL", "sample_size": c.sample_size, "in_channels": c.in_channels,
        "out_channels": c.out_channels, "down_block_types": ["DownEncoderBlock2D"] * len(c.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(c.widths), "block_out_channels": list(c.widths),
        "layers_per_block": c.num_blocks, "act_fn": "silu", "latent_channels": c.latent_channels,
        "norm_num_groups": c.norm_groups, "scaling_factor": c.scaling_factor,
        "shift_factor": c.shift_factor or None, "use_quant_conv": c.quant_conv,
        "use_post_quant_conv": c.post_quant_conv, "mid_block_add_attention": c.middle_attention,
    }  # fmt: skip


def preprocessing(config: Mapping[str, Any] | None, _: Any = None) -> dict[str, Any]:
    """Pixels in -1..1."""
    size = config.get("sample_size") if config else None
    return {"mean": (0.5,) * 3, "std": (0.5,) * 3} | ({"size": (size, size)} if isinstance(size, int) else {})


LAYOUT = Layout(
    name="diffusers-vae",
    title="diffusers AutoencoderKL (Stable Diffusion's autoencoder)",
    configure=configure,
    rules=rules,
    model_types=("AutoencoderKL",),
    signature=(
        "encoder.conv_in.weight", "encoder.conv_norm_out.weight", "encoder.mid_block.resnets.0.conv1.weight",
        "decoder.conv_in.weight",
        "decoder.conv_norm_out.weight", "decoder.mid_block.resnets.0.conv1.weight",
    ),
    to_config=to_config,
    preprocessing=preprocessing,
)  # fmt: skip
