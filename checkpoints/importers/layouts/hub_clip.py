"""The hub's ``CLIPModel`` (transformers)."""

from __future__ import annotations

from checkpoints.importers.layout import ImporterError, Layout, choose
from checkpoints.importers.layouts.hub_vit import ACTIVATION, pair
from checkpoints.importers.layouts.hub_vit import preprocessing as of_images
from checkpoints.importers.layouts.openai_clip import MEAN, STD
from checkpoints.importers.rules import LINEAR, Rule, conv2d, embedding, linear, norm
from zoo.nn.clip import CLIP, CLIPConfig, CLIPTextConfig
from zoo.nn.clip_resnet import CLIPResNetConfig
from zoo.nn.vit import ViTConfig


def configure(config, shapes):
    """From config.json."""
    if config is None:
        raise ImporterError("the hub's CLIP needs its config.json (heads, activation, end of text): give --config FILE")
    # an old file's *_config_dict counts before the other, as transformers reads it
    vision, text = (config.get(f"{k}_config_dict") or config.get(f"{k}_config") or {} for k in ("vision", "text"))
    eos = text.get("eos_token_id", 49407)
    if not isinstance(eos, int):
        raise ImporterError(f"config eos_token_id = {eos!r} is not supported; one number is")
    return CLIP(CLIPConfig(
        ViTConfig(
            pair(vision.get("image_size", 224)), pair(vision.get("patch_size", 32)), vision.get("num_channels", 3),
            vision.get("hidden_size", 768), vision.get("num_hidden_layers", 12), vision.get("num_attention_heads", 12),
            vision.get("intermediate_size", 3072), choose(vision, "hidden_act", ACTIVATION, "quick_gelu"),
            patch_bias=False, pre_norm=True, antialias=False, epsilon=vision.get("layer_norm_eps", 1e-5),
            attention_dropout=vision.get("attention_dropout", 0.0),
        ),
        CLIPTextConfig(
            text.get("vocab_size", 49408), text.get("max_position_embeddings", 77), text.get("hidden_size", 512),
            text.get("num_hidden_layers", 12), text.get("num_attention_heads", 8), text.get("intermediate_size", 2048),
            choose(text, "hidden_act", ACTIVATION, "quick_gelu"),
            # transformers reads 2, which old files have wrongly, as OpenAI's rule
            eot_id=None if eos == 2 else eos,
            epsilon=text.get("layer_norm_eps", 1e-5), attention_dropout=text.get("attention_dropout", 0.0),
        ),
        config.get("projection_dim", 512),
    ))  # fmt: skip


def rules(module):
    """The hub's name -> ours."""
    return (
        Rule("vision_model.embeddings.class_embedding", "image/class_token"),
        *conv2d("vision_model.embeddings.patch_embedding", "image/patches"),
        Rule("vision_model.embeddings.position_embedding.weight", "image/positions"),
        *norm("vision_model.pre_layrnorm", "image/pre_norm"),
        *_blocks("vision_model.encoder.layers.{i}", "image/layer{i}"),
        *norm("vision_model.post_layernorm", "image/norm"),
        Rule("visual_projection.weight", "image_projection/kernel", LINEAR),
        *embedding("text_model.embeddings.token_embedding", "text/tokens"),
        Rule("text_model.embeddings.position_embedding.weight", "text/positions"),
        *_blocks("text_model.encoder.layers.{i}", "text/layer{i}"),
        *norm("text_model.final_layer_norm", "text/norm"),
        Rule("text_projection.weight", "text_projection/kernel", LINEAR),
        Rule("logit_scale", "logit_scale"),
    )


def _blocks(block, ours):
    return (
        *norm(f"{block}.layer_norm1", f"{ours}/attention_norm"),
        *linear(f"{block}.self_attn.q_proj", f"{ours}/query"),
        *linear(f"{block}.self_attn.k_proj", f"{ours}/key"),
        *linear(f"{block}.self_attn.v_proj", f"{ours}/value"),
        *linear(f"{block}.self_attn.out_proj", f"{ours}/out"),
        *norm(f"{block}.layer_norm2", f"{ours}/mlp_norm"),
        *linear(f"{block}.mlp.fc1", f"{ours}/up"),
        *linear(f"{block}.mlp.fc2", f"{ours}/down"),
    )


def to_config(module):
    """config.json of ``CLIPModel``."""
    c, image, text = module.config, module.config.image, module.config.text
    if isinstance(image, CLIPResNetConfig):
        raise ImporterError("the hub's CLIP has no ResNet: export to openai-clip")
    act = lambda name: {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)  # noqa: E731
    towers = {
        "vision_config": {"model_type": "clip_vision_model", "image_size": image.image_size[0],
                          "patch_size": image.patch_size[0], "num_channels": image.channels},
        "text_config": {"model_type": "clip_text_model", "vocab_size": text.vocabulary,
                        "max_position_embeddings": text.context,
                        "eos_token_id": 2 if text.eot_id is None else text.eot_id},
    }  # fmt: skip
    for written, tower in zip(towers.values(), (image, text), strict=True):
        written |= {
            "hidden_size": tower.width, "num_hidden_layers": tower.depth, "num_attention_heads": tower.num_heads,
            "intermediate_size": tower.mlp_width, "hidden_act": act(tower.activation), "layer_norm_eps": tower.epsilon,
            "attention_dropout": tower.attention_dropout, "projection_dim": c.features,
        }  # fmt: skip
    return {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": c.features, **towers}


def preprocessing(config, preprocessor):
    """From preprocessor_config.json."""
    return of_images(config, preprocessor and {"image_mean": MEAN, "image_std": STD, "resample": 3, **preprocessor})


LAYOUT = Layout(
    name="hub-clip",
    title="CLIP as the hub's transformers write it (CLIPModel)",
    configure=configure,
    rules=rules,
    model_types=("clip",),
    signature=("vision_model.embeddings.patch_embedding.weight", "visual_projection.weight",
               "vision_model.encoder.layers.{i}.self_attn.q_proj.weight",
               "text_model.encoder.layers.{i}.self_attn.q_proj.weight"),
    buffers=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    to_config=to_config,
    preprocessing=preprocessing,
)  # fmt: skip
