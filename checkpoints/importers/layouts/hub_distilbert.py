"""DistilBERT as the hub stores it (transformers: DistilBertModel, ForMaskedLM, ForSequenceClassification)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, choose, depth, refuse
from checkpoints.importers.layouts._bert import (
    ACTIVATIONS,
    NAMES,
    classifier,
    prefixed,
    sentence_head,
    shared_config,
)
from checkpoints.importers.rules import LINEAR, Rule, embedding, linear, norm
from zoo.nn.bert import BERT, BERTConfig


def rules(module: BERT) -> tuple[Rule, ...]:
    """The table."""
    own = () if module.config.tied else (Rule("vocab_projector.weight", "mlm/kernel", LINEAR),)
    return (
        *embedding("embeddings.word_embeddings", "embeddings/word"),
        *embedding("embeddings.position_embeddings", "embeddings/position"),
        *norm("embeddings.LayerNorm", "embeddings/norm"),
        *linear("transformer.layer.{i}.attention.q_lin", "layer{i}/attention/query"),
        *linear("transformer.layer.{i}.attention.k_lin", "layer{i}/attention/key"),
        *linear("transformer.layer.{i}.attention.v_lin", "layer{i}/attention/value"),
        *linear("transformer.layer.{i}.attention.out_lin", "layer{i}/attention/out"),
        *norm("transformer.layer.{i}.sa_layer_norm", "layer{i}/attention_norm"),
        *linear("transformer.layer.{i}.ffn.lin1", "layer{i}/up"),
        *linear("transformer.layer.{i}.ffn.lin2", "layer{i}/down"),
        *norm("transformer.layer.{i}.output_layer_norm", "layer{i}/mlp_norm"),
        *linear("vocab_transform", "mlm/dense"),
        *norm("vocab_layer_norm", "mlm/norm"),
        Rule("vocab_projector.bias", "mlm/bias"),
        *own,
        *linear("pre_classifier", "classifier/hidden"),
        *linear("classifier", "classifier/out"),
        *linear("linear", "projection"),
    )


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> BERT:
    """The module for a config.  ``sinusoidal_pos_embds`` only says how the stored table was made."""
    if config is None:
        raise ImporterError(
            "hub-distilbert: weights tell neither the number of attention heads nor the activation; give --config FILE"
        )
    choose(config, "model_type", {"distilbert": None}, "distilbert")
    refuse(config, quantization_config=None, is_decoder=False, add_cross_attention=False, is_encoder_decoder=False)
    if config.get("pruned_heads"):
        raise ImporterError(f"config pruned_heads = {config['pruned_heads']!r} is not supported; only none are")
    layers = depth(shapes, "transformer.layer.{i}.")
    if layers != config.get("n_layers", 6):
        raise ImporterError(f"config n_layers = {config.get('n_layers', 6)}, but the weights hold {layers}")
    fields: dict[str, Any] = {
        "vocab_size": config.get("vocab_size", 30522), "width": config.get("dim", 768), "depth": layers,
        "num_heads": config.get("n_heads", 12), "mlp_width": config.get("hidden_dim", 3072),
        "max_positions": config.get("max_position_embeddings", 512), "token_types": 0,
        "activation": choose(config, "activation", ACTIVATIONS, "gelu"), "epsilon": 1e-12,
        "tied": config.get("tie_word_embeddings", True),
        "dropout": config.get("dropout", 0.1), "attention_dropout": config.get("attention_dropout", 0.1),
        "attention_out_dropout": 0.0, "head_dropout": config.get("seq_classif_dropout", 0.2),
    }  # fmt: skip
    if "vocab_projector.bias" in shapes:
        fields["head"] = "mlm"
    if "classifier.weight" in shapes:
        if "pre_classifier.weight" not in shapes:
            raise ImporterError("a classifier without pre_classifier (token classification) is not supported")
        fields |= classifier(shapes["classifier.weight"].shape[0]) | {"head_activation": "relu"}
    return BERT(BERTConfig(**fields | sentence_head(config, shapes)))


def to_config(module: BERT) -> dict[str, Any]:
    """config.json."""
    config = module.config
    if config.token_types or config.pad_id is not None or config.causal or config.epsilon != 1e-12:
        raise ImporterError("not a DistilBERT: it has token_types=0, pad_id=None, causal=False and epsilon=1e-12")
    kind = {"classifier": "DistilBertForSequenceClassification", "cross": "DistilBertForSequenceClassification",
            "mlm": "DistilBertForMaskedLM"}.get(config.head, "DistilBertModel")  # fmt: skip
    return {
        "model_type": "distilbert", "architectures": [kind], "vocab_size": config.vocab_size, "dim": config.width,
        "n_layers": config.depth, "n_heads": config.num_heads, "hidden_dim": config.mlp_width,
        "max_position_embeddings": config.max_positions, "activation": NAMES[config.activation],
        "tie_word_embeddings": config.tied, "dropout": config.dropout, "attention_dropout": config.attention_dropout,
        "seq_classif_dropout": config.head_dropout, **shared_config(config),
    }  # fmt: skip


def full_name(module: BERT, name: str) -> str:
    """``distilbert.`` before the encoder's names, if there is a head beside it."""
    return prefixed("distilbert.", module.config, name)


LAYOUT = Layout(
    name="hub-distilbert",
    title="DistilBERT (transformers)",
    configure=configure,
    rules=rules,
    model_types=("distilbert",),
    signature=("embeddings.word_embeddings.weight", "transformer.layer.{i}.attention.q_lin.weight"),
    prefixes=("distilbert.",),
    buffers=("embeddings.position_ids",),
    duplicates=(("vocab_projector.weight", "embeddings.word_embeddings.weight"),),
    to_config=to_config,
    full_name=full_name,
)
