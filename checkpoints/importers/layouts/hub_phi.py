"""transformers' Phi-1, 1.5 and 2: ``layers.{i}.self_attn.dense.weight``, ``layers.{i}.mlp.fc1.weight``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import Layout, Shapes, refuse
from checkpoints.importers.layouts import _decoder as shared
from checkpoints.importers.rules import Rule, embedding, linear, norm
from zoo.nn.decoder_lm import DecoderConfig, DecoderLM

DEFAULTS = {
    "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
    "qk_layernorm": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0, "head_dim": None,
}  # fmt: skip


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> DecoderLM:
    """All from the config."""
    config = shared.needed(config, "Phi")
    refuse(config, model_type="phi", tie_word_embeddings=False)
    shared.refuse_others(config, ("PhiForCausalLM",))
    said = {**DEFAULTS, **config}
    head = shared.head(config, shapes, tied=False)
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
            **shared.rope(config, fraction=0.5),
            norm_epsilon=said["layer_norm_eps"],
            block="parallel",
            activation=shared.activation(said, "hidden_act", "gelu_new"),
            qk_norm=said["qk_layernorm"],
            head=head,
            head_bias=head == "untied",
            **shared.rates(
                said, dropout="resid_pdrop", embedding_dropout="embd_pdrop", attention_dropout="attention_dropout"
            ),
        )
    )


def rules(_: DecoderLM) -> tuple[Rule, ...]:
    """The table."""
    attention, mlp = "layers.{i}.self_attn", "layers.{i}.mlp"
    return (
        *embedding("embed_tokens", "embed"),
        *shared.stacked(
            *norm("layers.{i}.input_layernorm", "layers/attention_norm"),
            *linear(f"{attention}.q_proj", "layers/query"),
            *linear(f"{attention}.k_proj", "layers/key"),
            *linear(f"{attention}.v_proj", "layers/value"),
            *linear(f"{attention}.dense", "layers/out"),
            *norm(f"{attention}.q_layernorm", "layers/query_norm"),
            *norm(f"{attention}.k_layernorm", "layers/key_norm"),
            *linear(f"{mlp}.fc1", "layers/up"),
            *linear(f"{mlp}.fc2", "layers/down"),
        ),
        *norm("final_layernorm", "final_norm"),
        *linear("lm_head", "head"),
    )


def to_config(module: DecoderLM) -> Mapping[str, Any]:
    """What ``PhiForCausalLM`` loads."""
    c = module.config
    return {
        "model_type": "phi",
        "architectures": shared.architecture(c, "PhiForCausalLM"),
        **shared.sizes(c),
        "intermediate_size": c.mlp_dim,
        "num_key_value_heads": c.kv_heads,
        "layer_norm_eps": c.norm_epsilon,
        "hidden_act": shared.NAMES[c.activation],
        "qk_layernorm": c.qk_norm,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.embedding_dropout,
        "attention_dropout": c.attention_dropout,
        "partial_rotary_factor": 1.0,
        **shared.rope_config(c),
    }


LAYOUT = Layout(
    name="hub-phi",
    title="Phi-1, Phi-1.5 and Phi-2 of transformers",
    configure=configure,
    rules=rules,
    model_types=("phi",),
    signature=("embed_tokens.weight", "final_layernorm.weight", "layers.{i}.self_attn.dense.weight",
               "layers.{i}.self_attn.q_proj.weight", "layers.{i}.mlp.fc1.weight"),
    prefixes=("model.",),
    buffers=("layers.{i}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    to_config=to_config,
    full_name=shared.full_name("model."),
)  # fmt: skip
