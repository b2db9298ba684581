"""Dense retrievers over RoBERTa as published (RobertaDot of ANCE, STAR and ADORE; pyserini's AnceEncoder).

``roberta.*`` is the library's encoder, ``embeddingHead`` a linear map of its first token, ``norm`` a layer norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, refuse
from checkpoints.importers.layouts import hub_roberta
from checkpoints.importers.layouts._bert import ENCODER
from checkpoints.importers.rules import Rule, linear, norm
from zoo.nn.bert import BERT
from zoo.nn.retriever import DenseRetriever

INSIDE = ("embeddings.", "encoder.", "pooler.")
"""Beginnings of the encoder's names."""


def _in_body(rule: Rule) -> Rule:
    return dataclasses.replace(rule, target=tuple(f"body/{t.removeprefix('params/')}" for t in rule.target))


def rules(module: DenseRetriever) -> tuple[Rule, ...]:
    """The table: RoBERTa's encoder under ``body``, the map and the norm."""
    return (*map(_in_body, ENCODER), *linear("embeddingHead", "projection"), *norm("norm", "norm"))


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> DenseRetriever:
    """The module for a config."""
    if "embeddingHead.weight" not in shapes:
        raise ImporterError("a dense retriever needs embeddingHead.weight; an encoder alone is hub-roberta's")
    # heads beside it belong to what it was trained from: the encoder is read as one without
    encoder = {name: x for name, x in shapes.items() if name.startswith(INSIDE)}
    body = hub_roberta.configure(config, encoder, "hub-dense-retriever")
    refuse(config, zoo=None, add_cross_attention=False)
    size = shapes["embeddingHead.weight"].shape[0]
    stated = config.get("output_embedding_size")
    features = stated if stated is not None or size == body.config.width else size
    return DenseRetriever(body, features, "first", pad_id=body.config.pad_id)


def to_config(module: DenseRetriever) -> dict[str, Any]:
    """config.json."""
    if not isinstance(module, DenseRetriever) or not isinstance(module.body, BERT) or module.body.config.head != "none":
        raise ImporterError("not a dense retriever over RoBERTa: it needs a DenseRetriever over a BERT without a head")
    if module.pooling != "first" or not module.norm:
        raise ImporterError("the library's dense retriever reads the first token and has a norm; this one does not")
    own = {} if module.features is None else {"output_embedding_size": module.features}
    return {**hub_roberta.to_config(module.body), "architectures": ["RobertaDot"], **own}


def full_name(module: DenseRetriever, name: str) -> str:
    """``roberta.`` before the encoder's names."""
    return f"roberta.{name}" if name.startswith(INSIDE) else name


LAYOUT = Layout(
    name="hub-dense-retriever",
    title="ANCE, STAR and ADORE over RoBERTa (RobertaDot, AnceEncoder)",
    configure=configure,
    rules=rules,
    model_types=hub_roberta.LAYOUT.model_types,
    signature=(*hub_roberta.LAYOUT.signature, "embeddingHead.weight", "norm.weight"),
    absent=hub_roberta.LAYOUT.absent,
    prefixes=hub_roberta.LAYOUT.prefixes,
    # ANCE was trained as a sequence classifier, whose head its files still hold
    buffers=(*hub_roberta.LAYOUT.buffers, "classifier.*", "lm_head.*"),
    to_config=to_config,
    full_name=full_name,
)
