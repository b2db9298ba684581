"""The hub's ``ViTModel`` and ``ViTForImageClassification`` (transformers)."""

from __future__ import annotations

from checkpoints.importers.layout import ImporterError, Layout, choose, depth, refuse
from checkpoints.importers.rules import Reshape, Rule, conv2d, linear, norm
from zoo.nn.vit import ViT, ViTConfig

ACTIVATION = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
              "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu"}  # fmt: skip
INTERPOLATION = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""PIL's numbers for ``resample``."""


def pair(x):
    """A size as (height, width)."""
    return tuple(x) if isinstance(x, (list, tuple)) else (x, x)


def configure(config, shapes):
    """From config.json; the head and the pooler are there if their weights are."""
    if config is None:
        raise ImporterError("the hub's ViT needs its config.json (heads, image size, epsilon): give --config FILE")
    width = config.get("hidden_size", 768)
    classes = shapes["classifier.weight"].shape[0] if "classifier.weight" in shapes else 0
    pooler = not classes and "pooler.dense.weight" in shapes
    if pooler:
        refuse(config, pooler_act="tanh")
        refuse(config, pooler_output_size=config.get("pooler_output_size") and width)
    refuse(config, head_dim=width // config.get("num_attention_heads", 12))
    return ViT(ViTConfig(
        pair(config.get("image_size", 224)), pair(config.get("patch_size", 16)), config.get("num_channels", 3), width,
        depth(shapes, "encoder.layer.{i}."), config.get("num_attention_heads", 12),
        config.get("intermediate_size", 3072),
        choose(config, "hidden_act", ACTIVATION, "gelu"),
        qkv_bias=config.get("qkv_bias", True),
        antialias=False,
        pooler=pooler,
        classes=classes,
        epsilon=config.get("layer_norm_eps", 1e-12),
        dropout=config.get("hidden_dropout_prob", 0.0),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.0),
    ))  # fmt: skip


def rules(module):
    """The hub's name -> ours."""
    rows = Reshape((1, -1, module.config.width), (-1, module.config.width))
    layer, attention = "encoder.layer.{i}", "encoder.layer.{i}.attention.attention"
    return (
        *conv2d("embeddings.patch_embeddings.projection", "patches"),
        Rule("embeddings.cls_token", "class_token", Reshape((1, 1, -1), (-1,))),
        Rule("embeddings.position_embeddings", "positions", rows),
        *norm(f"{layer}.layernorm_before", "layer{i}/attention_norm"),
        *linear(f"{attention}.query", "layer{i}/query"),
        *linear(f"{attention}.key", "layer{i}/key"),
        *linear(f"{attention}.value", "layer{i}/value"),
        *linear(f"{layer}.attention.output.dense", "layer{i}/out"),
        *norm(f"{layer}.layernorm_after", "layer{i}/mlp_norm"),
        *linear(f"{layer}.intermediate.dense", "layer{i}/up"),
        *linear(f"{layer}.output.dense", "layer{i}/down"),
        *norm("layernorm", "norm"),
        *linear("pooler.dense", "pooler"),
        *linear("classifier", "head"),
    )


def full_name(module, name):
    """A classifier's file has ``vit.`` before all but the head."""
    return f"vit.{name}" if module.config.classes and not name.startswith("classifier.") else name


def to_config(module):
    """config.json of ``ViTModel`` or ``ViTForImageClassification``."""
    c = module.config
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if c.classes else "ViTModel"],
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(c.activation, c.activation),
        "intermediate_size": c.mlp_width,
        **common(c),
    }


def common(c):
    """The entries that the hub's ViT and DINOv2 share."""
    labels = {"id2label": {str(i): f"LABEL_{i}" for i in range(c.classes)}} if c.classes else {}
    return {
        "image_size": c.image_size[0] if c.image_size[0] == c.image_size[1] else list(c.image_size),
        "patch_size": c.patch_size[0] if c.patch_size[0] == c.patch_size[1] else list(c.patch_size),
        "num_channels": c.channels, "hidden_size": c.width, "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads, "qkv_bias": c.qkv_bias, "layer_norm_eps": c.epsilon,
        "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.attention_dropout, **labels,
    }  # fmt: skip


def preprocessing(config, preprocessor):
    """From preprocessor_config.json; ``crop`` is the part of the shorter side that is kept."""
    if not preprocessor or not preprocessor.get("do_normalize", True):
        return None
    resized, cropped = preprocessor.get("size", 224), preprocessor.get("crop_size")
    side = lambda s: pair(s) if not isinstance(s, dict) else (  # noqa: E731
        (s["height"], s["width"]) if "height" in s else pair(s["shortest_edge"]))  # fmt: skip
    centred = bool(cropped) and preprocessor.get("do_center_crop", True)
    size = side(cropped if centred else resized)
    # without a crop the whole image is squeezed into the size, unless only its shorter side is given
    squeezed = not centred and not (isinstance(resized, dict) and "shortest_edge" in resized)
    resample = preprocessor.get("resample", 2)
    return {
        "size": size, "mean": tuple(preprocessor.get("image_mean", (0.5,) * 3)),
        "std": tuple(preprocessor.get("image_std", (0.5,) * 3)),
        "interpolation": resample if isinstance(resample, str) else INTERPOLATION[resample],
        "crop": None if squeezed else size[0] / side(resized)[0],
    }  # fmt: skip


LAYOUT = Layout(
    name="hub-vit",
    title="ViT as the hub's transformers write it (ViTModel, ViTForImageClassification)",
    configure=configure,
    rules=rules,
    model_types=("vit",),
    signature=("embeddings.patch_embeddings.projection.weight", "encoder.layer.{i}.layernorm_before.weight",
               "encoder.layer.{i}.attention.attention.query.weight"),
    prefixes=("vit.",),
    buffers=("embeddings.mask_token",),
    to_config=to_config,
    full_name=full_name,
    preprocessing=preprocessing,
)  # fmt: skip
