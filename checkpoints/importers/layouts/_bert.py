"""What the tables of BERT, RoBERTa and DistilBERT share (see :mod:`checkpoints.importers.layouts.hub_bert`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Shapes, choose, depth, refuse
from checkpoints.importers.rules import Rule, embedding, linear, norm
from zoo.nn.bert import BERTConfig

ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu",
}  # fmt: skip
NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "tanh": "tanh"}


def tf_norm(source: str, target: str) -> tuple[Rule, ...]:
    """A norm whose weights early files call gamma and beta."""
    return (
        *norm(source, target),
        Rule(f"{source}.gamma", f"{target}/scale"),
        Rule(f"{source}.beta", f"{target}/bias"),
    )


def attention(source: str, target: str) -> tuple[Rule, ...]:
    """Projections, the map back, and the norm after it."""
    return (
        *linear(f"{source}.self.query", f"{target}/query"),
        *linear(f"{source}.self.key", f"{target}/key"),
        *linear(f"{source}.self.value", f"{target}/value"),
        *linear(f"{source}.output.dense", f"{target}/out"),
        *tf_norm(f"{source}.output.LayerNorm", f"{target}_norm"),
    )


ENCODER = (
    *embedding("embeddings.word_embeddings", "embeddings/word"),
    *embedding("embeddings.position_embeddings", "embeddings/position"),
    *embedding("embeddings.token_type_embeddings", "embeddings/token_type"),
    *tf_norm("embeddings.LayerNorm", "embeddings/norm"),
    *attention("encoder.layer.{i}.attention", "layer{i}/attention"),
    *attention("encoder.layer.{i}.crossattention", "layer{i}/cross_attention"),
    *linear("encoder.layer.{i}.intermediate.dense", "layer{i}/up"),
    *linear("encoder.layer.{i}.output.dense", "layer{i}/down"),
    *tf_norm("encoder.layer.{i}.output.LayerNorm", "layer{i}/mlp_norm"),
    *linear("pooler.dense", "pooler"),
    # ColBERT's map (without bias), and the dual encoder's under the same name
    *linear("linear", "projection"),
)
"""What BERT and RoBERTa have in common."""


def common(config: Mapping[str, Any] | None, shapes: Shapes, name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of BERTConfig that BERT's and RoBERTa's configs spell alike."""
    if config is None:
        raise ImporterError(
            f"{name}: weights tell neither the number of attention heads nor the activation; give --config FILE"
        )
    refuse(
        config, position_embedding_type="absolute", is_encoder_decoder=False, tie_encoder_decoder=False,
        cross_attention_hidden_size=None, quantization_config=None,
    )  # fmt: skip
    if config.get("pruned_heads"):
        raise ImporterError(f"config pruned_heads = {config['pruned_heads']!r} is not supported; only none are")
    if config.get("add_cross_attention") and not config.get("is_decoder"):
        raise ImporterError("config add_cross_attention = True is not supported without is_decoder = True")
    get = lambda key: config.get(key, defaults[key])  # noqa: E731
    layers = depth(shapes, "encoder.layer.{i}.")
    if layers != get("num_hidden_layers"):
        raise ImporterError(f"config num_hidden_layers = {get('num_hidden_layers')}, but the weights hold {layers}")
    head_dropout = config.get("classifier_dropout")
    return {
        "vocab_size": get("vocab_size"), "width": get("hidden_size"), "depth": layers,
        "num_heads": get("num_attention_heads"), "mlp_width": get("intermediate_size"),
        "max_positions": get("max_position_embeddings"), "token_types": get("type_vocab_size"),
        "activation": choose(config, "hidden_act", ACTIVATIONS, "gelu"), "epsilon": get("layer_norm_eps"),
        "causal": config.get("is_decoder", False), "cross_attention": config.get("add_cross_attention", False),
        "tied": config.get("tie_word_embeddings", True),
        "pooler": "pooler.dense.weight" in shapes,
        "dropout": config.get("hidden_dropout_prob", 0.1),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.1),
        "head_dropout": config.get("hidden_dropout_prob", 0.1) if head_dropout is None else head_dropout,
    }  # fmt: skip


DEFAULTS = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip
"""The library's: its files leave out what has the default value."""


def sentence_head(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Head of a file with a ``linear`` map or with our own ``zoo`` entry; nothing otherwise."""
    own = dict(config.get("zoo", {}))
    if "linear.weight" in shapes:
        own["projection"] = shapes["linear.weight"].shape[0]
        own.setdefault("head", "dual" if "linear.bias" in shapes else "colbert")
        if own["head"] == "dual":
            own["projection_bias"] = "linear.bias" in shapes
    return own


def classifier(labels: int) -> dict[str, Any]:
    """One label is a cross-encoder's score."""
    return {"head": "cross"} if labels == 1 else {"head": "classifier", "num_labels": labels}


def common_config(config: BERTConfig) -> dict[str, Any]:
    """The other way: entries of config.json that BERT's and RoBERTa's share."""
    out = {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads, "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions, "type_vocab_size": config.token_types,
        "hidden_act": NAMES[config.activation], "layer_norm_eps": config.epsilon, "is_decoder": config.causal,
        "add_cross_attention": config.cross_attention, "tie_word_embeddings": config.tied,
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.head_dropout,
    }  # fmt: skip
    return out | shared_config(config)


def shared_config(config: BERTConfig) -> dict[str, Any]:
    """Labels, and what of a head no library's config can say."""
    labels = {"classifier": config.num_labels, "cross": 1}.get(config.head)
    out: dict[str, Any] = {} if labels is None else {"id2label": {str(i): f"LABEL_{i}" for i in range(labels)}}
    if labels is not None:
        out["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    if config.head in ("dual", "colbert"):
        keep = ("head", "pooling", "normalise") if config.head == "dual" else ("head",)
        out["zoo"] = {name: getattr(config, name) for name in keep}
    return out


def prefixed(prefix: str, config: BERTConfig, name: str) -> str:
    """The name with the prefix, unless it is the head's or there is none."""
    alone = config.head == "none" and not config.next_sentence
    alone |= config.head == "dual" and config.projection is None
    inside = name.startswith(("embeddings.", "encoder.", "transformer.", "pooler."))
    return prefix + name if inside and not alone else name
