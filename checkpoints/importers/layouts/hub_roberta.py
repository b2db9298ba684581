"""RoBERTa as the hub stores it (transformers: RobertaModel, ForMaskedLM, ForCausalLM, ForSequenceClassification)."""

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
)
from checkpoints.importers.rules import LINEAR, Rule, linear, norm
from zoo.nn.bert import BERT, BERTConfig


def rules(module: BERT) -> tuple[Rule, ...]:
    """The table: BERT's encoder, heads of its own."""
    own = () if module.config.tied else (Rule("lm_head.decoder.weight", "mlm/kernel", LINEAR),)
    return (
        *ENCODER,
        *linear("lm_head.dense", "mlm/dense"),
        *norm("lm_head.layer_norm", "mlm/norm"),
        Rule("lm_head.bias", "mlm/bias"),
        *own,
        *linear("classifier.dense", "classifier/hidden"),
        *linear("classifier.out_proj", "classifier/out"),
    )


def configure(config: Mapping[str, Any] | None, shapes: Shapes, name: str = "hub-roberta") -> BERT:
    """The module for a config; ``name`` of the layout, for messages."""
    fields = common(config, shapes, name, {**DEFAULTS, "vocab_size": 50265})
    choose(config, "model_type", dict.fromkeys(("roberta", "xlm-roberta", "camembert")), "roberta")
    pad = config.get("pad_token_id", 1)
    if pad is None:
        raise ImporterError("config pad_token_id = None is not supported; RoBERTa's positions are counted from it")
    # the library's MLM head is exact gelu whatever hidden_act says
    fields |= {"pad_id": pad, "mlm_activation": "gelu"}
    if "lm_head.bias" in shapes:
        fields["head"] = "mlm"
    if "classifier.weight" in shapes:
        raise ImporterError("a classifier of one layer (token classification, multiple choice) is not supported")
    if "classifier.out_proj.weight" in shapes:
        fields |= classifier(shapes["classifier.out_proj.weight"].shape[0]) | {"head_activation": "tanh"}
    return BERT(BERTConfig(**fields | sentence_head(config, shapes)))


def to_config(module: BERT) -> dict[str, Any]:
    """config.json."""
    config = module.config
    if config.pad_id is None or (config.head == "mlm" and (config.mlm_activation or config.activation) != "gelu"):
        raise ImporterError("not a RoBERTa: it needs pad_id, and an MLM head with mlm_activation='gelu'")
    words = "RobertaForCausalLM" if config.causal else "RobertaForMaskedLM"
    sentence = "RobertaForSequenceClassification"
    kind = {"classifier": sentence, "cross": sentence, "mlm": words}.get(config.head, "RobertaModel")
    return {
        "model_type": "roberta", "architectures": [kind], **common_config(config), "pad_token_id": config.pad_id,
    }  # fmt: skip


def full_name(module: BERT, name: str) -> str:
    """``roberta.`` before the encoder's names, if there is a head beside it."""
    return prefixed("roberta.", module.config, name)


LAYOUT = Layout(
    name="hub-roberta",
    title="RoBERTa, XLM-RoBERTa, CamemBERT (transformers)",
    configure=configure,
    rules=rules,
    model_types=("roberta", "xlm-roberta", "camembert"),
    signature=(
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "encoder.layer.{i}.attention.self.query.weight",
    ),  # fmt: skip
    absent=("cls.predictions.bias",),
    prefixes=("roberta.",),
    buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    duplicates=(
        ("lm_head.decoder.weight", "embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
    ),
    to_config=to_config,
    full_name=full_name,
)
