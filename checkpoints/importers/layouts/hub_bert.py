"""BERT as the hub stores it (transformers' BertModel and heads: MLM, pre-training, classification, decoder; ColBERT's).

What it shares with RoBERTa and DistilBERT stands in ``_bert.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, choose
from checkpoints.importers.layouts._bert import (
    DEFAULTS,
    ENCODER,
    classifier,
    common,
    common_config,
    prefixed,
    sentence_head,
    tf_norm,
)  # fmt: skip
from checkpoints.importers.rules import LINEAR, Rule, linear
from zoo.nn.bert import BERT, BERTConfig


def rules(module: BERT) -> tuple[Rule, ...]:
    """The table."""
    own = () if module.config.tied else (Rule("cls.predictions.decoder.weight", "mlm/kernel", LINEAR),)
    return (
        *ENCODER,
        *linear("cls.predictions.transform.dense", "mlm/dense"),
        *tf_norm("cls.predictions.transform.LayerNorm", "mlm/norm"),
        Rule("cls.predictions.bias", "mlm/bias"),
        *own,
        *linear("cls.seq_relationship", "next_sentence"),
        *linear("classifier", "classifier/out"),
    )


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> BERT:
    """The module for a config."""
    fields = common(config, shapes, "hub-bert", DEFAULTS)
    choose(config, "model_type", {"bert": None}, "bert")
    fields["next_sentence"] = "cls.seq_relationship.weight" in shapes
    if "cls.predictions.bias" in shapes:
        fields["head"] = "mlm"
    if "classifier.weight" in shapes:
        if not fields["pooler"]:
            raise ImporterError("a classifier without a pooler (token classification) is not supported")
        fields |= classifier(shapes["classifier.weight"].shape[0])
    return BERT(BERTConfig(**fields | sentence_head(config, shapes)))


def to_config(module: BERT) -> dict[str, Any]:
    """config.json."""
    config = module.config
    kind = {"classifier": "BertForSequenceClassification", "cross": "BertForSequenceClassification",
            "colbert": "HF_ColBERT", "mlm": "BertForMaskedLM"}.get(config.head, "BertModel")  # fmt: skip
    if config.head == "mlm" and (config.next_sentence or config.causal):
        kind = "BertForPreTraining" if config.next_sentence else "BertLMHeadModel"
    return {"model_type": "bert", "architectures": [kind], **common_config(config)}


def full_name(module: BERT, name: str) -> str:
    """``bert.`` before the encoder's names, if there is a head beside it."""
    return prefixed("bert.", module.config, name)


LAYOUT = Layout(
    name="hub-bert",
    title="BERT and ColBERT (transformers)",
    configure=configure,
    rules=rules,
    model_types=("bert",),
    signature=(
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "encoder.layer.{i}.attention.self.query.weight",
    ),  # fmt: skip
    absent=("lm_head.dense.weight", "classifier.out_proj.weight"),
    prefixes=("bert.",),
    buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    duplicates=(
        ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    to_config=to_config,
    full_name=full_name,
)
