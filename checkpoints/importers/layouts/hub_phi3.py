"""transformers' Phi-3: LLaMA's block with queries, keys and values in one matrix, and gate and up in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import Layout, Shapes, refuse
from checkpoints.importers.layouts import _decoder as shared
from checkpoints.importers.rules import LINEAR, Rule, Split, embedding, norm
from zoo.nn.decoder_lm import DecoderConfig, DecoderLM

DEFAULTS = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "sliding_window": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> DecoderLM:
    """All from the config.  ``embd_pdrop`` is honoured though transformers has stopped reading it."""
    config = shared.needed(config, "Phi-3")
    rope = shared.rope(config)
    refuse({"model_type": "phi3", **config, **rope}, model_type="phi3", rope_scaling="default")
    shared.refuse_others(config, ("Phi3ForCausalLM",))
    said = {**DEFAULTS, **config}
    return DecoderLM(
        DecoderConfig(
            vocab_size=said["vocab_size"],
            hidden_size=said["hidden_size"],
            num_layers=shared.layers(shapes, "layers.{i}.", said["num_hidden_layers"]),
            num_heads=said["num_attention_heads"],
            num_kv_heads=said["num_key_value_heads"],
            head_dim=said["head_dim"],
            mlp_dim=said["intermediate_size"],
            max_positions=said["max_position_embeddings"],
            **rope,
            norm="rms",
            norm_epsilon=said["rms_norm_eps"],
            activation=shared.activation(said, "hidden_act", "silu"),
            gated=True,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            window=said["sliding_window"],
            head=shared.head(config, shapes, tied=False),
            **shared.rates(
                said, dropout="resid_pdrop", embedding_dropout="embd_pdrop", attention_dropout="attention_dropout"
            ),
        )
    )


def rules(module: DecoderLM) -> tuple[Rule, ...]:
    """The table."""
    c = module.config
    attention, mlp = "layers.{i}.self_attn", "layers.{i}.mlp"
    keys = c.kv_heads * c.head_width
    heads = Split(0, (c.num_heads * c.head_width, keys, keys))
    kernels = ("layers/query/kernel", "layers/key/kernel", "layers/value/kernel")
    return (
        *embedding("embed_tokens", "embed"),
        *shared.stacked(
            *norm("layers.{i}.input_layernorm", "layers/attention_norm"),
            Rule(f"{attention}.qkv_proj.weight", kernels, (heads, LINEAR)),
            Rule(f"{attention}.o_proj.weight", "layers/out/kernel", LINEAR),
            *norm("layers.{i}.post_attention_layernorm", "layers/mlp_norm"),
            Rule(f"{mlp}.gate_up_proj.weight", ("layers/gate/kernel", "layers/up/kernel"), (Split(0, 2), LINEAR)),
            Rule(f"{mlp}.down_proj.weight", "layers/down/kernel", LINEAR),
        ),
        *norm("norm", "final_norm"),
        Rule("lm_head.weight", "head/kernel", LINEAR),
    )


def to_config(module: DecoderLM) -> Mapping[str, Any]:
    """What ``Phi3ForCausalLM`` loads."""
    c = module.config
    return {
        "model_type": "phi3",
        "architectures": shared.architecture(c, "Phi3ForCausalLM"),
        **shared.sizes(c),
        "original_max_position_embeddings": c.max_positions,
        "intermediate_size": c.mlp_dim,
        "num_key_value_heads": c.kv_heads,
        "rms_norm_eps": c.norm_epsilon,
        "hidden_act": shared.NAMES[c.activation],
        "sliding_window": c.window,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.embedding_dropout,
        "attention_dropout": c.attention_dropout,
        "pad_token_id": None,
        **shared.rope_config(c),
    }


LAYOUT = Layout(
    name="hub-phi3",
    title="Phi-3 of transformers (no LongRoPE)",
    configure=configure,
    rules=rules,
    model_types=("phi3",),
    signature=("embed_tokens.weight", "norm.weight", "layers.{i}.self_attn.qkv_proj.weight",
               "layers.{i}.mlp.gate_up_proj.weight"),
    prefixes=("model.",),
    buffers=("layers.{i}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    duplicates=(("lm_head.weight", "embed_tokens.weight"),),
    to_config=to_config,
    full_name=shared.full_name("model."),
)  # fmt: skip
