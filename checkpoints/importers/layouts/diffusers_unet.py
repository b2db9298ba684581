"""diffusers' ``UNet2DConditionModel`` as in Stable Diffusion 1.x and 2.x -> :class:`UNet2DCondition`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, choose, depth, refuse
from checkpoints.importers.rules import LINEAR, Reshape, Rule, Split, conv2d, linear, norm
from zoo.nn.unet2d_condition import UNet2DCondition, UNet2DConditionConfig

PUBLISHED = (UNet2DConditionConfig.sd15(), UNet2DConditionConfig.sd21())
DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
ONLY = {
    "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False, "downsample_padding": 1,
    "mid_block_scale_factor": 1, "reverse_transformer_layers_per_block": None, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "num_attention_heads": None, "dual_cross_attention": False,
    "class_embed_type": None, "addition_embed_type": None, "num_class_embeds": None,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_act_fn": None, "timestep_post_act": None,
    "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
    "class_embeddings_concat": False, "mid_block_only_cross_attention": None, "cross_attention_norm": None,
}  # fmt: skip
"""Entries that this zoo knows one value of."""
# without effect once the above hold: sizes of embeddings that are absent
IDLE = {"addition_time_embed_dim", "projection_class_embeddings_input_dim", "addition_embed_type_num_heads"}
READ = {
    "sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift",
    "down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "dropout", "act_fn",
    "norm_num_groups", "norm_eps", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim",
    "use_linear_projection", "upcast_attention", "time_embedding_dim",
}  # fmt: skip


def residual(source: str, target: str) -> list[Rule]:
    """``ResnetBlock2D``."""
    return [
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *conv2d(f"{source}.conv1", f"{target}/conv1"),
        *linear(f"{source}.time_emb_proj", f"{target}/condition"),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *conv2d(f"{source}.conv2", f"{target}/conv2"),
        *conv2d(f"{source}.conv_shortcut", f"{target}/skip"),
    ]


def transformer(source: str, target: str, width: int, linear_projection: bool) -> list[Rule]:
    """``Transformer2DModel``."""
    flat = (LINEAR,) if linear_projection else (Reshape((-1, width, 1, 1), (-1, width)), LINEAR)
    layer, ours = f"{source}.transformer_blocks.{{j}}", f"{target}/layer{{j}}"
    table = [
        *norm(f"{source}.norm", f"{target}/norm"),
        Rule(f"{source}.proj_in.weight", f"{target}/in/kernel", flat),
        Rule(f"{source}.proj_in.bias", f"{target}/in/bias"),
        Rule(f"{source}.proj_out.weight", f"{target}/out/kernel", flat),
        Rule(f"{source}.proj_out.bias", f"{target}/out/bias"),
        *norm(f"{layer}.norm1", f"{ours}/norm1"),
        *norm(f"{layer}.norm2", f"{ours}/norm2"),
        *norm(f"{layer}.norm3", f"{ours}/norm3"),
        Rule(f"{layer}.ff.net.0.proj.weight", (f"{ours}/up/kernel", f"{ours}/gate/kernel"), (LINEAR, Split(1, 2))),
        Rule(f"{layer}.ff.net.0.proj.bias", (f"{ours}/up/bias", f"{ours}/gate/bias"), Split(0, 2)),
        *linear(f"{layer}.ff.net.2", f"{ours}/down"),
    ]
    for attn, name in (("attn1", "self_attention"), ("attn2", "cross_attention")):
        for part, side in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            table.append(Rule(f"{layer}.{attn}.{part}.weight", f"{ours}/{name}/{side}/kernel", LINEAR))
        table += linear(f"{layer}.{attn}.to_out.0", f"{ours}/{name}/out")
    return table


def rules(module: UNet2DCondition) -> list[Rule]:
    """The table."""
    c = module.config
    table = [
        *linear("time_embedding.linear_1", "time/first"),
        *linear("time_embedding.linear_2", "time/second"),
        *conv2d("conv_in", "conv_in"),
        *norm("conv_norm_out", "norm_out"),
        *conv2d("conv_out", "conv_out"),
        *residual("mid_block.resnets.{i}", "middle_block{i}"),
        *transformer("mid_block.attentions.0", "middle_attention", c.widths[-1], c.linear_projection),
    ]
    for level, width in enumerate(c.widths):
        down, up = f"down_blocks.{level}", f"up_blocks.{len(c.widths) - 1 - level}"
        table += residual(f"{down}.resnets.{{i}}", f"encoder{level}_block{{i}}")
        table += transformer(f"{down}.attentions.{{i}}", f"encoder{level}_attention{{i}}", width, c.linear_projection)
        table += conv2d(f"{down}.downsamplers.0.conv", f"encoder{level}_down")
        table += residual(f"{up}.resnets.{{i}}", f"decoder{level}_block{{i}}")
        table += transformer(f"{up}.attentions.{{i}}", f"decoder{level}_attention{{i}}", width, c.linear_projection)
        table += conv2d(f"{up}.upsamplers.0.conv", f"decoder{level}_up")
    return table


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> UNet2DCondition:
    """From config.json, or the published model of these shapes."""
    if config is None:
        return UNet2DCondition(_published(shapes))
    if unknown := sorted(k for k in set(config) - set(ONLY) - IDLE - READ if not k.startswith("_")):
        raise ImporterError(f"config {', '.join(unknown)} is unknown for {LAYOUT.name}")
    refuse(config, **ONLY)
    choose(config, "act_fn", {"silu": None, "swish": None}, "silu")
    widths = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    downs = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    ups = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    cross = tuple(choose({"down_block_types": t}, "down_block_types", DOWN, None) for t in downs)
    if cross[::-1] != tuple(choose({"up_block_types": t}, "up_block_types", UP, None) for t in ups):
        raise ImporterError(f"config up_block_types = {ups} does not mirror down_block_types = {downs}")
    if config.get("time_embedding_dim") not in (None, 4 * widths[0]):
        raise ImporterError(f"config time_embedding_dim = {config['time_embedding_dim']} is not 4 * {widths[0]}")
    heads, size = config.get("attention_head_dim", 8), config.get("sample_size") or 64
    c = UNet2DConditionConfig(
        sample_size=size if isinstance(size, int) else max(size), in_channels=config.get("in_channels", 4),
        out_channels=config.get("out_channels", 4), widths=widths, num_blocks=_one(config, "layers_per_block", 2),
        cross_attention=cross, num_heads=(heads,) * len(widths) if isinstance(heads, int) else tuple(heads),
        context_width=_one(config, "cross_attention_dim", 1280),
        transformer_layers=_one(config, "transformer_layers_per_block", 1),
        linear_projection=config.get("use_linear_projection", False),
        upcast_attention=bool(config.get("upcast_attention", False)),
        center_input=config.get("center_input_sample", False), sine_first=not config.get("flip_sin_to_cos", True),
        frequency_shift=float(config.get("freq_shift", 0)), norm_groups=_groups(config),
        norm_epsilon=float(config.get("norm_eps", 1e-5)), dropout=float(config.get("dropout", 0.0)),
    )  # fmt: skip
    return UNet2DCondition(c)


def _one(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    values = {value} if isinstance(value, int) else set(value)
    if len(values) > 1 or not all(isinstance(v, int) for v in values):
        raise ImporterError(f"config {key} = {value!r} is not supported; only one number for all resolutions is")
    return values.pop()


def _groups(config: Mapping[str, Any]) -> int:
    if config.get("norm_num_groups", 32) is None:
        raise ImporterError("config norm_num_groups = None is not supported; only a number of groups is")
    return config.get("norm_num_groups", 32)


def _published(shapes: Shapes) -> UNet2DConditionConfig:
    """The published model whose channels these are; in- and outpainting variants differ in the first convolution."""
    levels = depth(shapes, "down_blocks.{i}.")
    names = [f"down_blocks.{n}.resnets.0.conv2.weight" for n in range(levels)]
    widths = tuple(shapes[n].shape[0] if n in shapes else None for n in names)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    for known in PUBLISHED:
        if widths == known.widths and shapes[key].shape[1] == known.context_width:
            return dataclasses.replace(known, in_channels=shapes["conv_in.weight"].shape[1])
    raise ImporterError(
        f"channels {widths} and a context of {shapes[key].shape[1]} features are no published model, and the shapes do "
        "not tell how many heads there are; give its config.json with --config FILE"
    )


def to_config(module: UNet2DCondition) -> dict[str, Any]:
    """config.json of the reference library."""
    c = module.config
    downs, ups = {v: k for k, v in DOWN.items()}, {v: k for k, v in UP.items()}
    return {
        "_class_name": "UNet2DConditionModel", "sample_size": c.sample_size, "in_channels": c.in_channels,
        "out_channels": c.out_channels, "center_input_sample": c.center_input, "flip_sin_to_cos": not c.sine_first,
        "freq_shift": c.frequency_shift, "down_block_types": [downs[x] for x in c.cross_attention],
        "up_block_types": [ups[x] for x in c.cross_attention[::-1]], "block_out_channels": list(c.widths),
        "layers_per_block": c.num_blocks, "dropout": c.dropout, "act_fn": "silu", "norm_num_groups": c.norm_groups,
        "norm_eps": c.norm_epsilon, "cross_attention_dim": c.context_width,
        "transformer_layers_per_block": c.transformer_layers, "attention_head_dim": list(c.num_heads),
        "use_linear_projection": c.linear_projection, "upcast_attention": c.upcast_attention,
    }  # fmt: skip


LAYOUT = Layout(
    name="diffusers-unet",
    title="diffusers UNet2DConditionModel (Stable Diffusion 1.x and 2.x)",
    configure=configure,
    rules=rules,
    model_types=("UNet2DConditionModel",),
    signature=(
        "time_embedding.linear_1.weight", "conv_in.weight", "conv_norm_out.weight", "mid_block.resnets.0.conv1.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    ),
    to_config=to_config,
)  # fmt: skip
