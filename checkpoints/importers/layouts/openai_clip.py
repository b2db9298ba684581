"""OpenAI's CLIP state dicts (vision transformer or modified ResNet), whose names open_clip's native models have too.

Without a config the file must be OpenAI's own, which three scalars show; open_clip's models differ from those in what
shapes do not tell (GELU or QuickGELU, heads), so they need their ``open_clip_config.json``.
"""

from __future__ import annotations

import math

from checkpoints.importers.layout import ImporterError, Layout, batch_counters, choose, depth, refuse
from checkpoints.importers.rules import LINEAR, Rule, Split, batch_norm, conv2d, embedding, linear, norm
from zoo.nn.clip import CLIP, CLIPConfig, CLIPTextConfig
from zoo.nn.clip_resnet import CLIPResNetConfig
from zoo.nn.vit import ViTConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SCALARS = ("input_resolution", "context_length", "vocab_size")
SCALED = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
OTHER_BLOCKS = {**dict.fromkeys(SCALED, False), "hf_model_name": None}


def configure(config, shapes):
    """Sizes are read from shapes, as OpenAI's ``build_model`` does; open_clip's config tells the rest."""
    if not config and not set(SCALARS) <= set(shapes):
        raise ImporterError("CLIP weights that are not OpenAI's own file need open_clip_config.json, which tells heads "
                            "and GELU from QuickGELU: give --config FILE")  # fmt: skip
    model = (config or {}).get("model_cfg", config) or {"quick_gelu": True}
    vision, text = dict(model.get("vision_cfg") or {}), dict(model.get("text_cfg") or {})
    refuse(model, init_logit_bias=None, nonscalar_logit_scale=False)
    refuse(vision, timm_model_name=None, attentional_pool=False, patch_dropout=0.0, **OTHER_BLOCKS)
    refuse(text, embed_cls=False, no_causal_mask=False, final_ln_after_pool=False, proj_type="linear", proj_bias=False,
           **OTHER_BLOCKS)  # fmt: skip
    custom = "text." if "text.ln_final.weight" in shapes else ""
    shape = lambda name: shapes[f"{custom}{name}"].shape  # noqa: E731
    context, width = shape("positional_embedding")
    features = shape("text_projection")[1]
    pool = choose(text, "pool_type", {"argmax": None, "eos": text.get("eos_id", 2)}, "argmax")
    tower = CLIPTextConfig(
        vocabulary=shape("token_embedding.weight")[0], context=context, width=width,
        depth=depth(shapes, f"{custom}transformer.resblocks.{{i}}."),
        num_heads=text.get("heads", 8) if config else width // 64,
        mlp_width=shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        activation=_activation(model, text), layer_scale=text.get("ls_init_value"), eot_id=pool, epsilon=_epsilon(text),
    )  # fmt: skip
    return CLIP(CLIPConfig(_image(model, vision, shapes, features), tower, features))


def _image(model, vision, shapes, features):
    head_width = vision.get("head_width", 64)
    size = vision.get("image_size")
    size = None if size is None else (size, size) if isinstance(size, int) else tuple(size)
    if "visual.attnpool.positional_embedding" in shapes:
        rows, channels = shapes["visual.attnpool.positional_embedding"].shape
        return CLIPResNetConfig(
            tuple(depth(shapes, f"visual.layer{s}.{{i}}.") for s in (1, 2, 3, 4)), channels // 32,
            channels // head_width, features, size or (math.isqrt(rows - 1) * 32,) * 2,
        )  # fmt: skip
    if "visual.conv1.weight" not in shapes:
        raise ImporterError("this CLIP's image tower is neither a vision transformer nor the modified ResNet")
    width, channels, *patch = shapes["visual.conv1.weight"].shape
    rows = shapes["visual.positional_embedding"].shape[0] - 1
    return ViTConfig(
        size or (math.isqrt(rows) * patch[0], math.isqrt(rows) * patch[1]), tuple(patch), channels, width,
        depth(shapes, "visual.transformer.resblocks.{i}."), width // head_width,
        shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0], _activation(model, vision), patch_bias=False,
        pre_norm="visual.ln_pre.weight" in shapes, layer_scale=vision.get("ls_init_value"),
        pool=choose(vision, "pool_type", {"tok": "token", "avg": "mean"}, "tok"),
        norm_after_pool=vision.get("final_ln_after_pool", False), epsilon=_epsilon(vision),
    )  # fmt: skip


def _activation(model, tower):
    kwargs = tower.get("act_kwargs") or {}
    if model.get("quick_gelu", False):
        refuse({"act_kwargs": kwargs}, act_kwargs={})
        return "quick_gelu"
    refuse(kwargs, **{k: None for k in kwargs if k != "approximate"})
    return choose(kwargs, "approximate", {"none": "gelu", "tanh": "gelu_tanh"}, "none")


def _epsilon(tower):
    kwargs = tower.get("norm_kwargs") or {}
    refuse(kwargs, **{k: None for k in kwargs if k != "eps"})
    return kwargs.get("eps", 1e-5)


def rules(module):
    """OpenAI's name -> ours; open_clip writes ``text.`` before some text towers."""
    image = _resnet() if isinstance(module.config.image, CLIPResNetConfig) else _vit()
    return (*image, *_text(""), *_text("text."), Rule("logit_scale", "logit_scale"))


def _vit():
    return (
        Rule("visual.class_embedding", "image/class_token"),
        Rule("visual.positional_embedding", "image/positions"),
        *conv2d("visual.conv1", "image/patches"),
        *norm("visual.ln_pre", "image/pre_norm"),
        *_blocks("visual.transformer", "image"),
        *norm("visual.ln_post", "image/norm"),
        Rule("visual.proj", "image_projection/kernel"),
    )


def _resnet():
    parts, names = {"1": "first", "2": "second", "3": "third"}, {"q": "query", "k": "key", "v": "value", "c": "out"}
    block, ours = "visual.layer{s}.{b}", "image/stage{s}_block{b}"
    return (
        *(r for k in "123" for r in conv2d(f"visual.conv{k}", f"image/stem{k}/conv")),
        *(r for k in "123" for r in batch_norm(f"visual.bn{k}", f"image/stem{k}/norm")),
        *(r for k, name in parts.items() for r in conv2d(f"{block}.conv{k}", f"{ours}/{name}/conv")),
        *(r for k, name in parts.items() for r in batch_norm(f"{block}.bn{k}", f"{ours}/{name}/norm")),
        *conv2d(f"{block}.downsample.0", f"{ours}/shortcut/conv"),
        *batch_norm(f"{block}.downsample.1", f"{ours}/shortcut/norm"),
        Rule("visual.attnpool.positional_embedding", "image/positions"),
        *(r for k, name in names.items() for r in linear(f"visual.attnpool.{k}_proj", f"image/pool/{name}")),
    )


def _text(base):
    return (
        *embedding(f"{base}token_embedding", "text/tokens"),
        Rule(f"{base}positional_embedding", "text/positions"),
        *_blocks(f"{base}transformer", "text"),
        *norm(f"{base}ln_final", "text/norm"),
        Rule(f"{base}text_projection", "text_projection/kernel"),
    )


def _blocks(source, tower):
    block, ours = f"{source}.resblocks.{{i}}", f"{tower}/layer{{i}}"
    qkv = [f"{ours}/{name}" for name in ("query", "key", "value")]
    return (
        *norm(f"{block}.ln_1", f"{ours}/attention_norm"),
        Rule(f"{block}.attn.in_proj_weight", tuple(f"{n}/kernel" for n in qkv), (LINEAR, Split(1, 3))),
        Rule(f"{block}.attn.in_proj_bias", tuple(f"{n}/bias" for n in qkv), Split(0, 3)),
        *linear(f"{block}.attn.out_proj", f"{ours}/out"),
        Rule(f"{block}.ls_1.gamma", f"{ours}/attention_scale"),
        *norm(f"{block}.ln_2", f"{ours}/mlp_norm"),
        *linear(f"{block}.mlp.c_fc", f"{ours}/up"),
        *linear(f"{block}.mlp.c_proj", f"{ours}/down"),
        Rule(f"{block}.ls_2.gamma", f"{ours}/mlp_scale"),
    )


def to_config(module):
    """``open_clip_config.json``, from which open_clip builds the same model."""
    c, image, text = module.config, module.config.image, module.config.text
    size = image.image_size
    vision = {"image_size": size[0] if size[0] == size[1] else list(size), "width": image.width}
    if isinstance(image, CLIPResNetConfig):
        vision |= {"layers": list(image.blocks), "head_width": image.channels // image.num_heads, "patch_size": None}
    else:
        vision |= {"layers": image.depth, "head_width": image.width // image.num_heads,
                   "patch_size": image.patch_size[0], "mlp_ratio": (image.mlp_width + 0.25) / image.width,
                   "ls_init_value": image.layer_scale,
                   "no_ln_pre": not image.pre_norm, "pool_type": "avg" if image.pool == "mean" else "tok",
                   "final_ln_after_pool": image.norm_after_pool, **_kwargs(image)}  # fmt: skip
    pool = {"pool_type": "argmax"} if text.eot_id is None else {"pool_type": "eos", "eos_id": text.eot_id}
    return {
        "model_cfg": {
            "embed_dim": c.features, "quick_gelu": text.activation == "quick_gelu", "vision_cfg": vision,
            "text_cfg": {"context_length": text.context, "vocab_size": text.vocabulary, "width": text.width,
                         "heads": text.num_heads, "layers": text.depth, "ls_init_value": text.layer_scale,
                         "mlp_ratio": (text.mlp_width + 0.25) / text.width, **pool, **_kwargs(text)},
        },
        "preprocess_cfg": {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic"},
    }  # fmt: skip


def _kwargs(tower):
    act = {"act_kwargs": {"approximate": "tanh"}} if tower.activation == "gelu_tanh" else {}
    return {**act, "norm_kwargs": {"eps": tower.epsilon}} if tower.epsilon != 1e-5 else act


def preprocessing(config, preprocessor):
    """OpenAI's, or what ``preprocess_cfg`` says."""
    config = config or {}
    said, size = (
        config.get("preprocess_cfg") or {},
        (config.get("model_cfg") or config).get("vision_cfg", {}).get("image_size"),
    )
    found = {"mean": tuple(said.get("mean", MEAN)), "std": tuple(said.get("std", STD)),
             "interpolation": said.get("interpolation", "bicubic"), "crop": 1.0}  # fmt: skip
    return found if size is None else {"size": (size, size) if isinstance(size, int) else tuple(size), **found}


LAYOUT = Layout(
    name="openai-clip",
    title="CLIP as OpenAI's files and open_clip's native models have it",
    configure=configure,
    rules=rules,
    signature=(
        "visual.conv1.weight",
        "*transformer.resblocks.{i}.attn.in_proj_weight",
        "*ln_final.weight",
        "logit_scale",
    ),
    buffers=(*SCALARS, "*num_batches_tracked"),
    new_buffers=batch_counters,
    to_config=to_config,
    preprocessing=preprocessing,
)
