"""Golden cases and key lists of ViT: timm's classes and the hub's, with weights in the names that their files have.

python tests/golden/make/vit.py
"""

import json
import tempfile
from pathlib import Path

import timm
import torch
import transformers
from common import save_case, save_keys, seeded
from safetensors.torch import load_file

torch.set_num_threads(1)


def images(size, batch=2, channels=3, seed=1):
    return torch.randn(batch, *size, channels, generator=torch.Generator().manual_seed(seed))


def nchw(x):
    return x.permute(0, 3, 1, 2)


def timm_case(name, architecture, size, other=None, **args):
    """``other``: a second image size, for which timm resamples the positions itself."""
    torch.manual_seed(0)
    settings = dict(img_size=list(size), **args)
    model = seeded(timm.create_model(architecture, **settings), scale=0.6)
    x = images(size, channels=args.get("in_chans", 3))
    inputs, outputs = {"images": x}, {}
    with torch.no_grad():
        for mode in ("eval", "train"):  # all rates are 0: the same numbers
            model.train(mode == "train")
            tokens = model.forward_features(nchw(x))
            pooled = model.forward_head(tokens, pre_logits=True)
            found = {"tokens": tokens, "pooled": pooled, "logits": model(nchw(x))}
            outputs |= {f"{mode}.{k}": v for k, v in found.items()}
        if other:
            dynamic = timm.create_model(architecture, **settings, dynamic_img_size=True).eval()
            dynamic.load_state_dict(model.state_dict())
            inputs["other"] = images(other, channels=args.get("in_chans", 3))
            outputs["other.tokens"] = dynamic.forward_features(nchw(inputs["other"]))
    for mode in ("eval", "train"):
        if not args.get("num_classes", 1000):
            del outputs[f"{mode}.logits"]
        if args.get("global_pool") == "":
            del outputs[f"{mode}.pooled"]
    config = {"architecture": architecture, "model_args": settings}
    call = f"timm.create_model({architecture!r}, **{settings}): forward_features, forward_head(pre_logits), forward"
    save_case(name, model.state_dict(), config, inputs, outputs, call, "timm")


def hub_case(name, kind, config, size, other=None, **settings):
    torch.manual_seed(0)
    model = seeded(getattr(transformers, kind)(config), scale=0.6).eval()
    x = images(size, channels=config.num_channels)
    inputs, outputs = {"images": x}, {}
    resize = {} if "Dinov2" in kind else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        body = getattr(model, model.base_model_prefix, model)
        found = body(nchw(x))
        outputs["eval.tokens"] = found.last_hidden_state
        if hasattr(model, "classifier"):
            outputs["eval.logits"] = model(nchw(x)).logits
        elif found.pooler_output is not None:
            outputs["eval.pooled"] = found.pooler_output
        if "Dinov2" in kind:
            inputs["masked"] = torch.rand(2, 25, generator=torch.Generator().manual_seed(3)) < 0.4
            outputs["masked.tokens"] = body(nchw(x), bool_masked_pos=inputs["masked"]).last_hidden_state
        if other:
            inputs["other"] = images(other, channels=config.num_channels)
            outputs["other.tokens"] = body(nchw(inputs["other"]), **resize).last_hidden_state
    with tempfile.TemporaryDirectory() as folder:  # the names on disk are not those in memory
        model.save_pretrained(folder)
        tensors = load_file(f"{folder}/model.safetensors")
        written = json.loads((Path(folder) / "config.json").read_text())
    save_case(name, tensors, written, inputs, outputs, f"transformers.{kind}({config.to_diff_dict()})", "transformers")


def timm_cases():
    base = "vit_base_patch16_224"
    # every size differs: 6 x 5 patches of 4 x 3 pixels, 24 wide, 3 heads, 60 hidden, 7 classes
    timm_case("vit_timm", base, (24, 15), (28, 24), patch_size=[4, 3], embed_dim=24, depth=3, num_heads=3,
              mlp_ratio=2.5, num_classes=7)  # fmt: skip
    timm_case("vit_timm_square", base, (16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1.0,
              num_classes=16)  # fmt: skip
    timm_case("vit_timm_none", base, (16, 8), patch_size=4, embed_dim=16, depth=2, num_heads=4, mlp_ratio=2.0,
              num_classes=5, global_pool="", in_chans=2)  # fmt: skip
    timm_case("vit_timm_gap", "vit_medium_patch16_gap_256", (20, 20), (12, 24), patch_size=4, embed_dim=24, depth=2,
              num_heads=3, mlp_ratio=2.0, num_classes=7)  # fmt: skip
    timm_case("vit_timm_fc_norm", "vit_wee_patch16_reg1_gap_256", (16, 20), patch_size=4, embed_dim=24, depth=2,
              num_heads=2, mlp_ratio=3.0, num_classes=5, reg_tokens=3, act_layer="gelu_tanh")  # fmt: skip
    timm_case("vit_timm_registers", "vit_small_patch14_reg4_dinov2", (15, 20), (30, 10), patch_size=5, embed_dim=24,
              depth=3, num_heads=4, mlp_ratio=2.0, num_classes=0)  # fmt: skip
    timm_case("vit_timm_all_positions", base, (16, 12), (12, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2,
              mlp_ratio=2.0, num_classes=3, reg_tokens=2, init_values=0.1)  # fmt: skip
    timm_case("vit_timm_no_positions", base, (16, 12), patch_size=4, embed_dim=16, depth=2, num_heads=2,
              mlp_ratio=2.0, num_classes=3, pos_embed="none", drop_path_rate=0.0)  # fmt: skip
    timm_case("vit_timm_distilled", "deit_base_distilled_patch16_224", (16, 12), (20, 20), patch_size=4, embed_dim=24,
              depth=2, num_heads=3, mlp_ratio=2.0, num_classes=7)  # fmt: skip
    timm_case("vit_timm_clip", "vit_base_patch16_clip_quickgelu_224", (16, 12), patch_size=4, embed_dim=24, depth=2,
              num_heads=3, mlp_ratio=2.0, num_classes=7, qk_norm=True)  # fmt: skip
    timm_case("vit_timm_swiglu", "vit_giant_patch14_dinov2", (16, 12), patch_size=4, embed_dim=24, depth=2,
              num_heads=3, mlp_ratio=3.0, num_classes=0)  # fmt: skip


def hub_cases():
    vit = lambda **k: transformers.ViTConfig(  # noqa: E731
        **{**{"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
              "image_size": 20, "patch_size": 4, "num_channels": 3}, **k})  # fmt: skip
    hub_case("vit_hub", "ViTModel", vit(), (20, 20), (28, 12))
    hub_case("vit_hub_classifier", "ViTForImageClassification",
             vit(num_labels=7, qkv_bias=False, hidden_act="quick_gelu", layer_norm_eps=1e-3), (20, 20))  # fmt: skip
    hub_case("vit_hub_square", "ViTModel", vit(hidden_size=16, intermediate_size=16, num_attention_heads=2), (20, 20))
    dino = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 20, "patch_size": 4}
    hub_case("vit_hub_dinov2", "Dinov2Model", transformers.Dinov2Config(**dino, mlp_ratio=2), (20, 20), (28, 12))
    hub_case("vit_hub_dinov2_swiglu", "Dinov2Model",
             transformers.Dinov2Config(**dino, mlp_ratio=2, use_swiglu_ffn=True, qkv_bias=False), (20, 20))  # fmt: skip
    hub_case("vit_hub_dinov2_registers", "Dinov2WithRegistersForImageClassification",
             transformers.Dinov2WithRegistersConfig(**dino, mlp_ratio=3, num_register_tokens=3, num_labels=5),
             (20, 20), (12, 32))  # fmt: skip


def key_lists():
    """Full-size lists; hub file = ``architecture`` and sizes alone in config.json, as timm publishes it."""
    totals = {
        # timm's results/model_metadata-in1k.csv and model cards, in parameters of the classifier
        "vit_small_patch16_224": (22050664, "timm model card: 22.1M; DeiT paper, table 1: 22M"),
        "vit_base_patch16_224": (86567656, "torchvision's docs for vit_b_16 (num_params 86567656); timm card: 86.6M"),
        "vit_large_patch16_224": (
            304326632,
            "torchvision's docs for vit_l_16 (num_params 304326632); timm card: 304.3M",
        ),
        "vit_base_patch32_224": (88224232, "torchvision's docs for vit_b_32 (num_params 88224232); timm card: 88.2M"),
        "deit_small_patch16_224": (22050664, "DeiT paper, table 1: 22M; timm card: 22.1M"),
        "deit_small_distilled_patch16_224": (22436432, "timm card: 22.4M"),
        "vit_small_patch14_reg4_dinov2": (22057344, "timm card: 22.1M (518 pixels)"),
        "vit_base_patch14_reg4_dinov2": (86582016, "timm card: 86.6M (518 pixels)"),
    }
    for name, (total, source) in totals.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        counted = sum(p.numel() for p in model.parameters())
        assert counted == total, (name, counted)
        cfg = model.pretrained_cfg
        config = {
            "architecture": name, "num_classes": cfg["num_classes"], "num_features": model.num_features,
            "pretrained_cfg": {k: cfg[k] for k in ("input_size", "interpolation", "crop_pct", "mean", "std")},
        }  # fmt: skip
        save_keys(f"timm-{name}", "timm-vit", model, config, total, source)
    with torch.device("meta"):
        dino = timm.create_model("vit_small_patch16_224", num_classes=0)
    total = sum(p.numel() for p in dino.parameters())
    assert total == 21665664, total
    save_keys("dino_deitsmall16_pretrain", "timm-vit", dino, None, total,
              "facebookresearch/dino README: ViT-S/16, 21M; the file is a bare state dict without config")  # fmt: skip
    # facebookresearch/dinov2's own file: timm folds the class token's position into the token and drops the mask token
    shapes = {k: list(v.shape) for k, v in timm.create_model("vit_small_patch14_reg4_dinov2").state_dict().items()}
    shapes["register_tokens"], shapes["mask_token"] = shapes.pop("reg_token"), [1, 384]
    shapes["pos_embed"][1] += 1
    save_keys("dinov2_vits14_reg4_pretrain", "timm-vit", shapes, None, 22057344 + 2 * 384,
              "facebookresearch/dinov2 README: ViT-S/14 distilled with registers, 21 M; a bare state dict")  # fmt: skip
    for name, kind, config, total, source in (
        ("google-vit-base-patch16-224", "ViTForImageClassification", transformers.ViTConfig(num_labels=1000), 86567656,
         "torchvision's docs for vit_b_16; hub page: 86.6M params"),
        ("google-vit-base-patch16-224-in21k", "ViTModel", transformers.ViTConfig(), 86389248, "hub page: 86.4M params"),
        ("facebook-dinov2-with-registers-base", "Dinov2WithRegistersModel",
         transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14), 86583552, "hub page: 86.6M params"),
    ):  # fmt: skip
        with torch.device("meta"):
            model = getattr(transformers, kind)(config)
        shapes = {_published(k, "Dinov2" in kind): v.shape for k, v in model.state_dict().items()}
        counted = sum(p.numel() for p in model.parameters())
        assert counted == total, (name, counted)
        written = {k: v for k, v in config.to_diff_dict().items() if not k.endswith(("2label", "2id"))}
        written = {**written, "architectures": [kind], "num_attention_heads": config.num_attention_heads}
        save_keys(name, "hub-dinov2" if "Dinov2" in kind else "hub-vit", shapes, written, total, source)


def _published(key, dinov2):
    """transformers 5's name in memory -> the name in published files."""
    names = [
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
    ]
    if not dinov2:
        names += [("layers.", "encoder.layer."), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")]
    for new, old in names:
        key = key.replace(new, old)
    return key


if __name__ == "__main__":
    timm_cases()
    hub_cases()
    key_lists()
