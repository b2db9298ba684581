"""Golden cases and key lists of CLIP: open_clip's native models (OpenAI's names) and the hub's.

python tests/golden/make/clip.py
"""

import contextlib
import json
import tempfile
from pathlib import Path

import open_clip
import torch
import transformers
from common import save_case, save_keys, seeded
from safetensors.torch import load_file

torch.set_num_threads(1)


def nchw(x):
    return x.permute(0, 3, 1, 2)


def draw(*shape, seed=1):
    # few different values: the files are small
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2).round().div(2)


@contextlib.contextmanager
def recorded():
    """The results of torch's attention function, of which the attention pooling hands on one token only."""
    kept, function = [], torch.nn.functional.multi_head_attention_forward

    def record(*args, **kwargs):
        out = function(*args, **kwargs)
        kept.append(out[0])
        return out

    torch.nn.functional.multi_head_attention_forward = record
    try:
        yield kept
    finally:
        torch.nn.functional.multi_head_attention_forward = function


def texts(vocabulary, length, ends):
    """Random ids, the largest one at each text's end, zeros after it."""
    ids = torch.randint(1, vocabulary - 1, (len(ends), length), generator=torch.Generator().manual_seed(2))
    for row, end in enumerate(ends):
        ids[row, end] = vocabulary - 1
        ids[row, end + 1 :] = 0
    return ids


def native_case(name, config, size, custom=False, train=False, **settings):
    """``custom``: the text tower under ``text.``."""
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = seeded(kind(**config), scale=0.6)
    with torch.no_grad():
        model.logit_scale.fill_(1.3)
        for owner in (model, getattr(model, "text", model)):
            if hasattr(owner, "attn_mask"):  # a buffer that is no weight: zeros and minus infinity again
                owner.attn_mask.copy_(torch.full_like(owner.attn_mask, -torch.inf).triu_(1))
    ids = texts(config["text_cfg"]["vocab_size"], config["text_cfg"]["context_length"], (3, 6, 4))
    inputs, outputs = {"images": draw(2, *size, 3), "ids": ids}, {}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for mode in ("train", "eval") if train else ("eval",):
            model.load_state_dict(before)
            model.train(mode == "train")
            outputs |= {f"{mode}.{k}": v for k, v in native_outputs(model, inputs, custom).items()}
            if mode == "train":  # the maps of one mode are enough
                outputs = {k: v for k, v in outputs.items() if k in ("train.image.pooled", "train.image.tokens")}
                stats = [v for k, v in model.state_dict().items() if k.endswith(("running_mean", "running_var"))]
                outputs["stats"] = torch.cat(stats)
    wrapped = {"model_cfg": {**config, **({"custom_text": True} if custom else {})}, "preprocess_cfg": {}}
    call = f"open_clip.{kind.__name__}(**{config}): forward, and the towers' own layers for tokens"
    save_case(name, before, wrapped, inputs, outputs, call, "open_clip_torch")


def native_outputs(model, inputs, custom):
    visual, text = model.visual, model.text if custom else model
    found = {"image.pooled": None}
    if hasattr(visual, "attnpool"):
        maps = visual.forward_intermediates(nchw(inputs["images"]), indices=5, intermediates_only=True)
        maps = [m.permute(0, 2, 3, 1).clone() for m in maps["image_intermediates"]]
        found["image.stem"] = maps[0]
        found |= {f"image.stage{i}": m for i, m in enumerate(maps) if i > 1}
        # once: in train mode each pass moves the statistics
        with recorded() as kept:
            found["image.pooled"] = visual.attnpool(maps[-1].permute(0, 3, 1, 2))
        found["image.tokens"] = kept[0].transpose(0, 1)
    else:
        found["image.pooled"] = model.encode_image(nchw(inputs["images"]))
        x = visual.transformer(visual._embeds(nchw(inputs["images"])))
        found["image.hidden"] = x if visual.final_ln_after_pool else visual.ln_post(x)
        found["image.tokens"] = found["image.hidden"] @ visual.proj
    found["text.pooled"] = model.encode_text(inputs["ids"])
    x = text.token_embedding(inputs["ids"]) + text.positional_embedding
    found["text.hidden"] = text.ln_final(text.transformer(x, attn_mask=text.attn_mask))
    found["text.tokens"] = found["text.hidden"] @ text.text_projection
    norm = torch.nn.functional.normalize
    found["logit_scale"] = model.logit_scale.exp()
    found["logits"] = found["logit_scale"] * norm(found["image.pooled"], dim=-1) @ norm(found["text.pooled"], dim=-1).T
    return found


def hub_case(name, eos, size=20, other=None, **changes):
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": size,
        "patch_size": 4,
    }
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "eos_token_id": eos,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    towers = {k: {**v, **changes.get(k, {})} for k, v in (("vision_config", vision), ("text_config", text))}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(**towers, projection_dim=changes.get("projection_dim", 20))
    model = seeded(transformers.CLIPModel(config), scale=0.6).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.3)
    ids = texts(50, 9, (3, 8, 5))
    if eos not in (2, 49):  # an added token beyond the end's: the largest id is not the end
        ids[:, 1] = 49
        for row, end in enumerate((3, 8, 5)):
            ids[row, end] = eos
    real = torch.arange(9)[None] <= torch.tensor([3, 8, 5])[:, None]
    real[1, 2] = False  # a hole, which causality alone would not show
    inputs = {"images": draw(2, size, size, 3), "ids": ids, "padding_mask": real}
    outputs = {}
    with torch.no_grad():
        both = model(input_ids=ids, pixel_values=nchw(inputs["images"]))
        masked = model.get_text_features(input_ids=ids, attention_mask=real.long())
        image, text = both.vision_model_output, both.text_model_output
        hidden = model.vision_model.post_layernorm(image.last_hidden_state)
        outputs |= {
            "eval.logits": both.logits_per_image, "eval.logit_scale": model.logit_scale.exp(),
            "eval.image.pooled": image.pooler_output, "eval.image.hidden": hidden,
            "eval.image.tokens": model.visual_projection(hidden),
            "eval.text.pooled": text.pooler_output, "eval.text.hidden": text.last_hidden_state,
            "eval.text.tokens": model.text_projection(text.last_hidden_state),
            "masked.text.pooled": masked.pooler_output, "masked.text.hidden": masked.last_hidden_state,
        }  # fmt: skip
        if other:
            inputs["other"] = draw(2, *other, 3)
            found = model.get_image_features(nchw(inputs["other"]), interpolate_pos_encoding=True)
            outputs["other.image.pooled"] = found.pooler_output
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(f"{folder}/model.safetensors")
        written = json.loads((Path(folder) / "config.json").read_text())
    save_case(
        name, tensors, written, inputs, outputs, f"transformers.CLIPModel({config.to_diff_dict()})", "transformers"
    )


def cases():
    text = {"context_length": 10, "vocab_size": 40, "width": 16, "heads": 2, "layers": 3}
    vit = {"image_size": 16, "patch_size": 4, "width": 24, "head_width": 8, "layers": 2}
    native_case("clip_openai_vit", {"embed_dim": 20, "quick_gelu": True, "vision_cfg": vit, "text_cfg": text}, (16, 16))
    native_case("clip_open_gelu", {
        "embed_dim": 16, "vision_cfg": {**vit, "width": 16, "mlp_ratio": 1.0, "norm_kwargs": {"eps": 1e-3},
                                  "act_kwargs": {"approximate": "tanh"}},
        "text_cfg": {**text, "mlp_ratio": 1.0, "pool_type": "eos", "eos_id": 39}}, (16, 16))  # fmt: skip
    native_case("clip_open_variant", {
        "embed_dim": 12, "vision_cfg": {**vit, "image_size": (16, 12), "no_ln_pre": True, "ls_init_value": 0.1,
                                  "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**text, "ls_init_value": 0.1}}, (16, 12), custom=True)  # fmt: skip
    tiny = {**text, "width": 8, "layers": 1}
    rn = {"image_size": 64, "width": 2, "layers": [1, 2, 1, 1], "head_width": 16, "patch_size": None}
    native_case(
        "clip_openai_rn",
        {"embed_dim": 20, "quick_gelu": True, "vision_cfg": rn, "text_cfg": tiny},
        (64, 64),
        train=True,
    )
    hub_case("clip_hub", 49, other=(28, 12))
    hub_case("clip_hub_legacy", 2, vision_config={"hidden_act": "gelu", "layer_norm_eps": 1e-3},
             text_config={"hidden_act": "gelu_new", "layer_norm_eps": 1e-4})  # fmt: skip
    hub_case("clip_hub_added_token", 30, projection_dim=16,
             vision_config={"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
             text_config={"intermediate_size": 16})  # fmt: skip


def key_lists():
    """Published totals: OpenAI's models as open_clip's docs/model_profile.csv counts them (in millions, two places)."""
    totals = {
        "ViT-B-32": 151277313,
        "ViT-B-16": 149620737,
        "ViT-L-14": 427616513,
        "ViT-L-14-336": 427944193,
        "RN50": 102007137,
    }
    said = "open_clip docs/model_profile.csv: {:.2f}M"
    hub = {"ViT-B-32": "base-patch32", "ViT-B-16": "base-patch16", "ViT-L-14": "large-patch14"}
    for name, total in totals.items():
        config = open_clip.get_model_config(name)
        with torch.device("meta"):
            model = open_clip.CLIP(**config)
        counted = sum(p.numel() for p in model.parameters())
        assert counted == total, (name, counted)
        source = said.format(total / 1e6)
        scalars = {"input_resolution": [], "context_length": [], "vocab_size": []}
        save_keys(f"openai-{name}", "openai-clip", model, None, total, source, extra=scalars)
        save_keys(f"open_clip-{name}", "openai-clip", model, {"model_cfg": config, "preprocess_cfg": {}}, total, source)
        if name in hub:
            vision, text = config["vision_cfg"], config["text_cfg"]
            written = transformers.CLIPConfig(
                projection_dim=config["embed_dim"],
                vision_config={"hidden_size": vision["width"], "intermediate_size": 4 * vision["width"],
                                   "num_hidden_layers": vision["layers"], "num_attention_heads": vision["width"] // 64,
                                   "image_size": vision["image_size"], "patch_size": vision["patch_size"]},
                text_config={"hidden_size": text["width"], "intermediate_size": 4 * text["width"],
                                 "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"],
                                 "eos_token_id": 2},
            )  # fmt: skip
            with torch.device("meta"):
                model = transformers.CLIPModel(written)
            assert sum(p.numel() for p in model.parameters()) == total
            patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
            # files of transformers before 4.31 hold the position ids
            ids = {"text_model.embeddings.position_ids": [1, 77], "vision_model.embeddings.position_ids": [1, patches]}
            save_keys(
                f"openai-clip-vit-{hub[name]}", "hub-clip", model, written.to_diff_dict(), total, source, extra=ids
            )


if __name__ == "__main__":
    cases()
    key_lists()
