"""transformers' OPT: ``decoder.layers.{i}.self_attn.q_proj.weight``, with and without ``model.`` before it.

The 350M model normalises after each branch, has no final norm, and embeds tokens in half the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import Layout, Shapes, refuse
from checkpoints.importers.layouts import _decoder as shared
from checkpoints.importers.rules import LINEAR, Rule, embedding, linear, norm
from zoo.nn.decoder_lm import DecoderConfig, DecoderLM

DEFAULTS = {
    "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12,
    "max_position_embeddings": 2048, "do_layer_norm_before": True, "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None, "dropout": 0.1, "attention_dropout": 0.0, "enable_bias": True,
}  # fmt: skip


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> DecoderLM:
    """All from the config."""
    config = shared.needed(config, "OPT")
    refuse(config, model_type="opt", layer_norm_elementwise_affine=True, layerdrop=0.0)
    shared.refuse_others(config, ("OPTForCausalLM",))
    said = {**DEFAULTS, **config}
    pre, width = said["do_layer_norm_before"], said["word_embed_proj_dim"]
    return DecoderLM(
        DecoderConfig(
            vocab_size=said["vocab_size"],
            hidden_size=said["hidden_size"],
            num_layers=shared.layers(shapes, "layers.{i}.", said["num_hidden_layers"]),
            num_heads=said["num_attention_heads"],
            mlp_dim=said["ffn_dim"],
            max_positions=said["max_position_embeddings"],
            position_offset=2,
            block="pre" if pre else "post",
            final_norm=pre and not said["_remove_final_layer_norm"],
            activation=shared.activation(said, "activation_function", "relu"),
            qkv_bias=said["enable_bias"],
            out_bias=said["enable_bias"],
            mlp_bias=said["enable_bias"],
            head=shared.head(config, shapes, tied=True),
            embedding_dim=None if width == said["hidden_size"] else width,
            **shared.rates(said, dropout="dropout", attention_dropout="attention_dropout"),
        )
    )


def rules(_: DecoderLM) -> tuple[Rule, ...]:
    """The table."""
    attention = "layers.{i}.self_attn"
    return (
        *embedding("embed_tokens", "embed"),
        *embedding("embed_positions", "positions"),
        Rule("project_in.weight", "project_in/kernel", LINEAR),
        Rule("project_out.weight", "project_out/kernel", LINEAR),
        *shared.stacked(
            *norm("layers.{i}.self_attn_layer_norm", "layers/attention_norm"),
            *linear(f"{attention}.q_proj", "layers/query"),
            *linear(f"{attention}.k_proj", "layers/key"),
            *linear(f"{attention}.v_proj", "layers/value"),
            *linear(f"{attention}.out_proj", "layers/out"),
            *norm("layers.{i}.final_layer_norm", "layers/mlp_norm"),
            *linear("layers.{i}.fc1", "layers/up"),
            *linear("layers.{i}.fc2", "layers/down"),
        ),
        *norm("final_layer_norm", "final_norm"),
        Rule("lm_head.weight", "head/kernel", LINEAR),
    )


def to_config(module: DecoderLM) -> Mapping[str, Any]:
    """What ``OPTForCausalLM`` loads."""
    c = module.config
    return {
        "model_type": "opt",
        "architectures": shared.architecture(c, "OPTForCausalLM"),
        **shared.sizes(c),
        "ffn_dim": c.mlp_dim,
        "word_embed_proj_dim": c.embedding_width,
        "do_layer_norm_before": c.block == "pre",
        "_remove_final_layer_norm": not c.final_norm,
        "activation_function": shared.NAMES[c.activation],
        "enable_bias": c.qkv_bias,
        "dropout": c.dropout,
        "attention_dropout": c.attention_dropout,
    }


LAYOUT = Layout(
    name="hub-opt",
    title="OPT of transformers (125M to 66B, the 350M variant included)",
    configure=configure,
    rules=rules,
    model_types=("opt",),
    signature=("embed_tokens.weight", "embed_positions.weight", "layers.{i}.self_attn.out_proj.weight",
               "layers.{i}.fc1.weight"),
    absent=("layers.{i}.encoder_attn.*", "encoder.*", "layernorm_embedding.*"),
    prefixes=("model.decoder.", "decoder."),
    buffers=("version",),
    duplicates=(("lm_head.weight", "embed_tokens.weight"),),
    to_config=to_config,
    full_name=shared.full_name("model.decoder."),
)  # fmt: skip
