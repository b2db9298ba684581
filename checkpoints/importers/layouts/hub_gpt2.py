"""transformers' GPT-2: ``h.{i}.attn.c_attn.weight``, with and without ``transformer.`` before it.

Its linear maps are stored ``[in, out]`` (``Conv1D``), so nothing is transposed; queries, keys and values are one map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, depth, refuse
from checkpoints.importers.layouts import _decoder as shared
from checkpoints.importers.rules import LINEAR, Rule, Split, embedding, norm
from zoo.nn.decoder_lm import DecoderConfig, DecoderLM

HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}
"""Width -> heads of the four published models (Radford et al., 2019, table 2)."""
DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> DecoderLM:
    """Without a config: the published models, by their width."""
    config = config or _published(shapes)
    refuse(
        config, model_type="gpt2", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )  # fmt: skip
    shared.refuse_others(config, ("GPT2LMHeadModel",))
    said = {**DEFAULTS, **config}
    return DecoderLM(
        DecoderConfig(
            vocab_size=said["vocab_size"],
            hidden_size=said["n_embd"],
            num_layers=shared.layers(shapes, "h.{i}.", said["n_layer"]),
            num_heads=said["n_head"],
            mlp_dim=said["n_inner"] or 4 * said["n_embd"],
            max_positions=said["n_positions"],
            norm_epsilon=said["layer_norm_epsilon"],
            activation=shared.activation(said, "activation_function", "gelu_new"),
            head=shared.head(config, shapes, tied=True),
            **shared.rates(said, dropout="resid_pdrop", embedding_dropout="embd_pdrop", attention_dropout="attn_pdrop"),
        )
    )


def _published(shapes: Shapes) -> dict[str, Any]:
    width = shapes["wte.weight"].shape[1]
    if width not in HEADS:
        raise ImporterError(
            f"GPT-2 weights of width {width} do not tell the number of heads; give config.json with --config FILE"
        )
    sizes = {"vocab_size": shapes["wte.weight"].shape[0], "n_positions": shapes["wpe.weight"].shape[0]}
    return {**sizes, "n_embd": width, "n_head": HEADS[width], "n_layer": depth(shapes, "h.{i}.")}


def _linear(source: str, *targets: str) -> tuple[Rule, Rule]:
    ops = Split(1, len(targets)), Split(0, len(targets))
    return tuple(
        Rule(f"{source}.{kind}", tuple(f"{t}/{leaf}" for t in targets), op if len(targets) > 1 else ())
        for kind, leaf, op in zip(("weight", "bias"), ("kernel", "bias"), ops, strict=True)
    )


def rules(_: DecoderLM) -> tuple[Rule, ...]:
    """The table."""
    return (
        *embedding("wte", "embed"),
        *embedding("wpe", "positions"),
        *shared.stacked(
            *norm("h.{i}.ln_1", "layers/attention_norm"),
            *_linear("h.{i}.attn.c_attn", "layers/query", "layers/key", "layers/value"),
            *_linear("h.{i}.attn.c_proj", "layers/out"),
            *norm("h.{i}.ln_2", "layers/mlp_norm"),
            *_linear("h.{i}.mlp.c_fc", "layers/up"),
            *_linear("h.{i}.mlp.c_proj", "layers/down"),
        ),
        *norm("ln_f", "final_norm"),
        Rule("lm_head.weight", "head/kernel", LINEAR),
    )


def to_config(module: DecoderLM) -> Mapping[str, Any]:
    """What ``GPT2LMHeadModel`` loads."""
    c = module.config
    return {
        "model_type": "gpt2",
        "architectures": shared.architecture(c, "GPT2LMHeadModel"),
        "vocab_size": c.vocab_size,
        "n_positions": c.max_positions,
        "n_embd": c.hidden_size,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": c.mlp_dim,
        "activation_function": shared.NAMES[c.activation],
        "layer_norm_epsilon": c.norm_epsilon,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.embedding_dropout,
        "attn_pdrop": c.attention_dropout,
        "tie_word_embeddings": c.head == "tied",
    }


LAYOUT = Layout(
    name="hub-gpt2",
    title="GPT-2 of transformers",
    configure=configure,
    rules=rules,
    model_types=("gpt2",),
    signature=("wte.weight", "wpe.weight", "h.{i}.attn.c_attn.weight", "h.{i}.mlp.c_fc.weight"),
    prefixes=("transformer.",),
    buffers=("h.{i}.attn.bias", "h.{i}.attn.masked_bias"),
    duplicates=(("lm_head.weight", "wte.weight"),),
    to_config=to_config,
    full_name=shared.full_name("transformer."),
)
