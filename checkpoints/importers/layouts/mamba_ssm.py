"""The original Mamba (state-spaces/mamba): transformers' names but ``backbone.embedding.weight``; its own config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, refuse
from checkpoints.importers.layouts import _decoder as shared
from checkpoints.importers.layouts import hub_mamba
from checkpoints.importers.rules import Rule
from zoo.nn.mamba import Mamba, MambaConfig

INITIAL = {"dt_min": "step_min", "dt_max": "step_max", "dt_init_floor": "step_floor"}
KNOWN = {"layer", "d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias", "use_fast_path", "dt_init", "dt_scale"}


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> Mamba:
    """Sizes from the shapes; the epsilon of the norms is not in these files: 1e-5 always."""
    config = config or {}
    refuse(config, rms_norm=True, d_intermediate=0, attn_layer_idx=[], attn_cfg={})
    inner = config.get("ssm_cfg") or {}
    refuse(inner, layer="Mamba1")
    strange = sorted(set(inner) - KNOWN - set(INITIAL))
    if strange:
        raise ImporterError(f"config ssm_cfg has {', '.join(strange)}, which is not supported")
    if not shapes:
        raise ImporterError("sizes are read from the weights; there are none")
    said = {ours: inner[theirs] for theirs, ours in INITIAL.items() if theirs in inner}
    return Mamba(
        MambaConfig(
            **hub_mamba.measured(shapes, "embedding.weight"),
            **said,
            float32_stream=config.get("residual_in_fp32", True),
            head="tied" if config.get("tie_embeddings", True) else "untied",
        )
    )


def rules(module: Mamba) -> tuple[Rule, ...]:
    """The table of :mod:`checkpoints.importers.layouts.hub_mamba`."""
    return hub_mamba.table(module, "embedding")


def to_config(module: Mamba) -> Mapping[str, Any]:
    """What ``MambaLMHeadModel`` loads."""
    c = module.config
    sizes = {"d_state": c.state_size, "d_conv": c.conv_size, "dt_rank": c.rank, "bias": c.use_bias}
    initial = {theirs: getattr(c, ours) for theirs, ours in INITIAL.items()}
    if c.norm_epsilon != 1e-5 or c.channels % c.hidden_size or c.head == "none":
        raise ImporterError(
            "mamba-ssm cannot express a norm_epsilon other than 1e-5, an inner_size that hidden_size does not divide, "
            "or head = 'none'"
        )
    return {
        "d_model": c.hidden_size,
        "n_layer": c.num_layers,
        "vocab_size": c.vocab_size,
        "ssm_cfg": {**sizes, "conv_bias": c.conv_bias, "expand": c.channels // c.hidden_size, **initial},
        "rms_norm": True,
        "residual_in_fp32": c.float32_stream,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": c.head == "tied",
    }


LAYOUT = Layout(
    name="mamba-ssm",
    title="Mamba of state-spaces/mamba",
    configure=configure,
    rules=rules,
    signature=("embedding.weight", "norm_f.weight", "layers.{i}.mixer.A_log", "layers.{i}.mixer.x_proj.weight"),
    prefixes=("backbone.",),
    duplicates=(("lm_head.weight", "embedding.weight"),),
    to_config=to_config,
    full_name=shared.full_name("backbone."),
)
