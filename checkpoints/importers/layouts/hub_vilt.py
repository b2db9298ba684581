"""ViLT as the hub stores it (transformers: ViltModel, ForMaskedLM, ForQuestionAnswering, ForImageAndTextRetrieval)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, choose, depth, refuse
from checkpoints.importers.layouts._bert import ACTIVATIONS, NAMES
from checkpoints.importers.rules import Reshape, Rule, conv2d, embedding, linear, norm
from zoo.nn.vilt import SingleStreamVLM, ViLTConfig


def rules(module: SingleStreamVLM) -> tuple[Rule, ...]:
    """The table."""
    width = module.config.width
    return (
        *embedding("embeddings.text_embeddings.word_embeddings", "text/word"),
        *embedding("embeddings.text_embeddings.position_embeddings", "text/position"),
        *embedding("embeddings.text_embeddings.token_type_embeddings", "text/token_type"),
        *norm("embeddings.text_embeddings.LayerNorm", "text/norm"),
        Rule("embeddings.cls_token", "image/class_token", Reshape((1, 1, width), (width,))),
        Rule("embeddings.position_embeddings", "image/position", Reshape((1, -1, width), (-1, width))),
        *conv2d("embeddings.patch_embeddings.projection", "image/patch"),
        *embedding("embeddings.token_type_embeddings", "modality"),
        *norm("encoder.layer.{i}.layernorm_before", "layer{i}/attention_norm"),
        *linear("encoder.layer.{i}.attention.attention.query", "layer{i}/attention/query"),
        *linear("encoder.layer.{i}.attention.attention.key", "layer{i}/attention/key"),
        *linear("encoder.layer.{i}.attention.attention.value", "layer{i}/attention/value"),
        *linear("encoder.layer.{i}.attention.output.dense", "layer{i}/attention/out"),
        *norm("encoder.layer.{i}.layernorm_after", "layer{i}/mlp_norm"),
        *linear("encoder.layer.{i}.intermediate.dense", "layer{i}/up"),
        *linear("encoder.layer.{i}.output.dense", "layer{i}/down"),
        *norm("layernorm", "norm"),
        *linear("pooler.dense", "pooler"),
        *linear("rank_output", "matching"),
        *linear("mlm_score.transform.dense", "mlm/dense"),
        *norm("mlm_score.transform.LayerNorm", "mlm/norm"),
        # newer versions of the library, and older ones
        Rule("mlm_score.decoder.bias", "mlm/bias"),
        Rule("mlm_score.bias", "mlm/bias"),
        *linear("classifier.0", "vqa_up"),
        *norm("classifier.1", "vqa_norm"),
        *linear("classifier.3", "vqa_out"),
    )


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> SingleStreamVLM:
    """The module for a config."""
    if config is None:
        raise ImporterError(
            "hub-vilt: weights tell neither the number of attention heads nor the activation; give --config FILE"
        )
    choose(config, "model_type", {"vilt": None}, "vilt")
    # with max_image_length patches are drawn at random; with num_images the head reads several images
    refuse(config, num_images=-1, quantization_config=None)
    if (config.get("max_image_length", -1) or -1) > 0:
        raise ImporterError(f"config max_image_length = {config['max_image_length']} is not supported; only -1 is")
    sides = {key: config.get(key, default) for key, default in (("image_size", 384), ("patch_size", 32))}
    for key, value in sides.items():
        if not isinstance(value, int):
            raise ImporterError(f"config {key} = {value!r} is not supported; only a whole number (a square) is")
    layers = depth(shapes, "encoder.layer.{i}.")
    if layers != config.get("num_hidden_layers", 12):
        said = config.get("num_hidden_layers", 12)
        raise ImporterError(f"config num_hidden_layers = {said}, but the weights hold {layers}")
    heads = {"rank_output.weight": "matching", "classifier.3.weight": "vqa"}
    heads |= dict.fromkeys(("mlm_score.bias", "mlm_score.decoder.bias"), "mlm")
    head = next((kind for name, kind in heads.items() if name in shapes), "none")
    return SingleStreamVLM(ViLTConfig(
        vocab_size=config.get("vocab_size", 30522), width=config.get("hidden_size", 768), depth=layers,
        num_heads=config.get("num_attention_heads", 12), mlp_width=config.get("intermediate_size", 3072),
        max_positions=config.get("max_position_embeddings", 40), token_types=config.get("type_vocab_size", 2),
        modalities=config.get("modality_type_vocab_size", 2), **sides, channels=config.get("num_channels", 3),
        qkv_bias=config.get("qkv_bias", True), activation=choose(config, "hidden_act", ACTIVATIONS, "gelu"),
        epsilon=config.get("layer_norm_eps", 1e-12), pooler="pooler.dense.weight" in shapes, head=head,
        num_labels=shapes["classifier.3.weight"].shape[0] if head == "vqa" else ViLTConfig.num_labels,
        dropout=config.get("hidden_dropout_prob", 0.0),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.0),
    ))  # fmt: skip


def to_config(module: SingleStreamVLM) -> dict[str, Any]:
    """config.json."""
    config = module.config
    kind = {"matching": "ViltForImageAndTextRetrieval", "mlm": "ViltForMaskedLM", "vqa": "ViltForQuestionAnswering"}
    out = {
        "model_type": "vilt", "architectures": [kind.get(config.head, "ViltModel")], "vocab_size": config.vocab_size,
        "type_vocab_size": config.token_types, "modality_type_vocab_size": config.modalities,
        "max_position_embeddings": config.max_positions, "hidden_size": config.width,
        "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width, "hidden_act": NAMES[config.activation],
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.epsilon, "image_size": config.image_size, "patch_size": config.patch_size,
        "num_channels": config.channels, "qkv_bias": config.qkv_bias, "max_image_length": -1,
    }  # fmt: skip
    if config.head == "vqa":
        out["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        out["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    return out


def preprocessing(config: Mapping[str, Any] | None, processor: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Normalisation; no size: the shorter side is resized and the ratio kept, to whole patches."""
    processor = processor or {}
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    return {
        "mean": tuple(processor.get("image_mean", (0.5,) * 3)), "std": tuple(processor.get("image_std", (0.5,) * 3)),
        "interpolation": names[processor.get("resample", 3)],
    }  # fmt: skip


def full_name(module: SingleStreamVLM, name: str) -> str:
    """``vilt.`` before the encoder's names, if there is a head beside it."""
    inside = name.startswith(("embeddings.", "encoder.", "layernorm.", "pooler."))
    return f"vilt.{name}" if inside and module.config.head != "none" else name


LAYOUT = Layout(
    name="hub-vilt",
    title="ViLT (transformers)",
    configure=configure,
    rules=rules,
    model_types=("vilt",),
    signature=("embeddings.text_embeddings.word_embeddings.weight", "embeddings.patch_embeddings.projection.weight"),
    prefixes=("vilt.",),
    buffers=("embeddings.text_embeddings.position_ids", "embeddings.text_embeddings.token_type_ids"),
    duplicates=(("mlm_score.decoder.weight", "embeddings.text_embeddings.word_embeddings.weight"),),
    to_config=to_config,
    full_name=full_name,
    preprocessing=preprocessing,
)
