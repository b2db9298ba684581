"""The hub's ``Dinov2Model`` and ``Dinov2WithRegistersModel``, and their classifiers (transformers)."""

from __future__ import annotations

from checkpoints.importers.layout import ImporterError, Layout, choose, depth, refuse
from checkpoints.importers.layouts.hub_vit import ACTIVATION, common, pair, preprocessing
from checkpoints.importers.rules import LINEAR, Reshape, Rule, Split, conv2d, linear, norm
from zoo.nn.vit import ViT, ViTConfig

BASES = ("dinov2.", "dinov2_with_registers.")


def configure(config, shapes):
    """From config.json; a classifier reads the class token and the patches' mean side by side."""
    if config is None:
        raise ImporterError("the hub's DINOv2 needs its config.json (heads, image size, epsilon): give --config FILE")
    refuse(config, drop_path_rate=0.0)
    width, heads = config.get("hidden_size", 768), config.get("num_attention_heads", 12)
    refuse(config, head_dim=width // heads)
    classes = shapes["classifier.weight"].shape[0] if "classifier.weight" in shapes else 0
    with_registers = config.get("model_type") == "dinov2_with_registers"
    gated = config.get("use_swiglu_ffn", False)
    hidden = int(width * config.get("mlp_ratio", 4))
    return ViT(ViTConfig(
        pair(config.get("image_size", 224)), pair(config.get("patch_size", 16 if with_registers else 14)),
        config.get("num_channels", 3), width, depth(shapes, "encoder.layer.{i}."), heads,
        # two thirds of the plain width, rounded up to a multiple of 8
        mlp_width=(int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
        activation="silu" if gated else choose(config, "hidden_act", ACTIVATION, "gelu"),
        gated=gated,
        qkv_bias=config.get("qkv_bias", True),
        layer_scale=config.get("layerscale_value", 1.0),
        registers=config.get("num_register_tokens", 4) if with_registers else 0,
        mask_token="embeddings.mask_token" in shapes,
        positions="class",
        antialias=with_registers,
        pool="token+mean" if classes else "token",
        classes=classes,
        epsilon=config.get("layer_norm_eps", 1e-6),
        dropout=config.get("hidden_dropout_prob", 0.0),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.0),
    ))  # fmt: skip


def rules(module):
    """The hub's name -> ours."""
    rows = Reshape((1, -1, module.config.width), (-1, module.config.width))
    layer, attention = "encoder.layer.{i}", "encoder.layer.{i}.attention.attention"
    both = ("layer{i}/gate", "layer{i}/up")
    gated = (
        Rule(f"{layer}.mlp.weights_in.weight", tuple(f"{t}/kernel" for t in both), (LINEAR, Split(1, 2))),
        Rule(f"{layer}.mlp.weights_in.bias", tuple(f"{t}/bias" for t in both), Split(0, 2)),
        *linear(f"{layer}.mlp.weights_out", "layer{i}/down"),
    )
    plain = (*linear(f"{layer}.mlp.fc1", "layer{i}/up"), *linear(f"{layer}.mlp.fc2", "layer{i}/down"))
    return (
        *conv2d("embeddings.patch_embeddings.projection", "patches"),
        Rule("embeddings.cls_token", "class_token", Reshape((1, 1, -1), (-1,))),
        Rule("embeddings.mask_token", "mask_token", Reshape((1, -1), (-1,))),
        Rule("embeddings.register_tokens", "registers", rows),
        Rule("embeddings.position_embeddings", "positions", rows),
        *norm(f"{layer}.norm1", "layer{i}/attention_norm"),
        *linear(f"{attention}.query", "layer{i}/query"),
        *linear(f"{attention}.key", "layer{i}/key"),
        *linear(f"{attention}.value", "layer{i}/value"),
        *linear(f"{layer}.attention.output.dense", "layer{i}/out"),
        Rule(f"{layer}.layer_scale1.lambda1", "layer{i}/attention_scale"),
        *norm(f"{layer}.norm2", "layer{i}/mlp_norm"),
        *(gated if module.config.gated else plain),
        Rule(f"{layer}.layer_scale2.lambda1", "layer{i}/mlp_scale"),
        *norm("layernorm", "norm"),
        *linear("classifier", "head"),
    )


def full_name(module, name):
    """A classifier's file has the model's name before all but the head."""
    base = BASES[bool(module.config.registers)]
    return f"{base}{name}" if module.config.classes and not name.startswith("classifier.") else name


def to_config(module):
    """config.json of the four classes."""
    c = module.config
    ratio = c.mlp_width * (1.5 if c.gated else 1) / c.width
    return {
        "model_type": "dinov2_with_registers" if c.registers else "dinov2",
        "architectures": [
            f"Dinov2{'WithRegisters' * bool(c.registers)}{'ForImageClassification' if c.classes else 'Model'}"
        ],
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh", "silu": "gelu"}.get(c.activation, c.activation),
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "use_swiglu_ffn": c.gated,
        "layerscale_value": c.layer_scale,
        **({"num_register_tokens": c.registers} if c.registers else {"use_mask_token": c.mask_token}),
        **common(c),
    }


LAYOUT = Layout(
    name="hub-dinov2",
    title="DINOv2 as the hub's transformers write it, with and without registers",
    configure=configure,
    rules=rules,
    model_types=("dinov2", "dinov2_with_registers"),
    signature=("embeddings.patch_embeddings.projection.weight", "encoder.layer.{i}.layer_scale1.lambda1",
               "encoder.layer.{i}.attention.attention.query.weight"),
    prefixes=BASES,
    to_config=to_config,
    full_name=full_name,
    preprocessing=preprocessing,
)  # fmt: skip
