"""T5 as the hub stores it (transformers: T5ForConditionalGeneration, T5Model, T5EncoderModel), original and v1.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, choose, depth, refuse
from checkpoints.importers.rules import LINEAR, Rule, embedding
from zoo.nn.t5 import T5, T5Config

FEED_FORWARD = {
    "relu": ("relu", False), "gelu": ("gelu", False), "gelu_new": ("gelu_tanh", False),
    # the library reads "gated-gelu" as the approximation
    "gated-gelu": ("gelu_tanh", True), "gated-gelu_new": ("gelu_tanh", True), "gated-relu": ("relu", True),
}  # fmt: skip


def attention(source: str, target: str) -> tuple[Rule, ...]:
    """Four kernels, layer i in row i."""
    names = {"q": "query", "k": "key", "v": "value", "o": "out"}
    return tuple(
        Rule(f"{source}.{theirs}.weight", f"{target}/{ours}/kernel[{{i}}]", LINEAR) for theirs, ours in names.items()
    )


def stack(name: str, gated: bool) -> tuple[Rule, ...]:
    """The encoder or the decoder; the feed-forward layer is the last of the block's."""
    layers, block, last = f"{name}/layers", f"{name}.block.{{i}}.layer", 2 if name == "decoder" else 1
    cross = (
        *attention(f"{block}.1.EncDecAttention", f"{layers}/cross_attention"),
        Rule(f"{block}.1.layer_norm.weight", f"{layers}/cross_attention_norm/scale[{{i}}]"),
    )
    up = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
    return (
        *embedding(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{name}/relative"),
        *attention(f"{block}.0.SelfAttention", f"{layers}/attention"),
        Rule(f"{block}.0.layer_norm.weight", f"{layers}/attention_norm/scale[{{i}}]"),
        *(cross if name == "decoder" else ()),
        *(
            Rule(f"{block}.{last}.DenseReluDense.{theirs}.weight", f"{layers}/{ours}/kernel[{{i}}]", LINEAR)
            for theirs, ours in {**up, "wo": "down"}.items()
        ),
        Rule(f"{block}.{last}.layer_norm.weight", f"{layers}/mlp_norm/scale[{{i}}]"),
        Rule(f"{name}.final_layer_norm.weight", f"{name}/norm/scale"),
    )


def rules(module: T5) -> tuple[Rule, ...]:
    """The table."""
    own = () if module.config.tied else (Rule("lm_head.weight", "head_kernel", LINEAR),)
    gated = module.config.gated
    return (*embedding("shared", "shared"), *stack("encoder", gated), *stack("decoder", gated), *own)


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> T5:
    """The module for a config.

    ``tie_word_embeddings = False`` (v1.1) means "no rescaling"; newer versions of the library say
    ``scale_decoder_outputs``.  Without rescaling, a stored ``lm_head`` is a weight; with it, a copy of the word table.
    """
    if config is None:
        raise ImporterError("hub-t5: weights do not tell max_distance, activation and rescaling; give --config FILE")
    choose(config, "model_type", {"t5": None}, "t5")
    # a stack alone as a decoder is no T5; quantised weights need their own arithmetic
    refuse(config, is_decoder=False, quantization_config=None)
    kind = config.get("feed_forward_proj", "relu")
    activation, gated = choose(config, "feed_forward_proj", FEED_FORWARD, "relu")
    said = {"dense_act_fn": "gelu_new" if kind == "gated-gelu" else kind.split("-")[-1], "is_gated_act": gated}
    refuse(config, **said)
    layers = {name: depth(shapes, f"{name}.block.{{i}}.") for name in ("encoder", "decoder")}
    claimed = config.get("num_layers", 6)
    decoder = config.get("num_decoder_layers")
    decoder = claimed if decoder is None else decoder
    if layers["encoder"] != claimed or layers["decoder"] not in (0, decoder):
        raise ImporterError(f"config has {claimed} and {decoder} layers, but the weights {tuple(layers.values())}")
    rescale = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False)
    start = config.get("decoder_start_token_id")
    return T5(T5Config(
        vocab_size=config.get("vocab_size", 32128), width=config.get("d_model", 512), head_dim=config.get("d_kv", 64),
        num_heads=config.get("num_heads", 8), mlp_width=config.get("d_ff", 2048), depth=claimed,
        decoder_depth=layers["decoder"], buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        epsilon=config.get("layer_norm_epsilon", 1e-6), activation=activation, gated=gated,
        # an encoder alone has no head: its module is the one that the preset with decoder_depth=0 gives
        tied=rescale or (layers["decoder"] > 0 and "lm_head.weight" not in shapes), rescale=rescale,
        start_id=config.get("pad_token_id", 0) if start is None else start, dropout=config.get("dropout_rate", 0.1),
    ))  # fmt: skip


def to_config(module: T5) -> dict[str, Any]:
    """config.json."""
    config = module.config
    kinds = {v: k for k, v in FEED_FORWARD.items() if k != "gated-gelu_new"}
    if (config.activation, config.gated) not in kinds:
        raise ImporterError(f"the library has no T5 with activation {config.activation!r} and gated {config.gated}")
    if config.rescale and not config.tied:
        raise ImporterError("the library rescales only with tied weights: set rescale=False or tied=True")
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration" if config.decoder_depth else "T5EncoderModel"],
        "vocab_size": config.vocab_size, "d_model": config.width, "d_kv": config.head_dim,
        "num_heads": config.num_heads, "d_ff": config.mlp_width, "num_layers": config.depth,
        "num_decoder_layers": config.decoder_depth or config.depth,
        "relative_attention_num_buckets": config.buckets, "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.epsilon, "feed_forward_proj": kinds[config.activation, config.gated],
        "tie_word_embeddings": config.rescale, "decoder_start_token_id": config.start_id, "pad_token_id": 0,
        "dropout_rate": config.dropout, "is_encoder_decoder": bool(config.decoder_depth),
    }  # fmt: skip


LAYOUT = Layout(
    name="hub-t5",
    title="T5, T5 v1.1, Flan-T5 (transformers)",
    configure=configure,
    rules=rules,
    model_types=("t5",),
    signature=("shared.weight", "encoder.block.{i}.layer.0.SelfAttention.q.weight"),
    prefixes=("transformer.",),
    # an unused table that the first published files hold, and the library ignores
    buffers=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    duplicates=(
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("decoder.embed_tokens.weight", "shared.weight"),
        ("lm_head.weight", "shared.weight"),
    ),
    to_config=to_config,
)
