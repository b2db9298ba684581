"""Golden cases of ADM's U-Net, from the two official repositories (neither is a package: give their checkouts).

git clone https://github.com/openai/guided-diffusion A; git clone https://github.com/openai/consistency_models B
python tests/golden/make/unet2d.py A B
"""

import functools
import importlib
import sys
import types

import torch
from common import save_case, save_keys, seeded

torch.set_num_threads(1)
torch.manual_seed(0)


def reference(folder, package):
    sys.path.insert(0, folder)
    # the package's logger and trainers are not needed
    sys.modules.setdefault("mpi4py", types.ModuleType("mpi4py"))
    return importlib.import_module(f"{package}.unet")


def keep(kept, key, _, __, out):
    kept[key] = out


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def build(unet, c, groups=None):
    """The arguments of create_model, as that function reads them."""
    size = c["image_size"]
    normalization = unet.normalization
    if groups:  # 32 channels and more would make large files
        unet.normalization = lambda channels: type(normalization(32))(groups, channels)
    model = unet.UNetModel(
        image_size=size, in_channels=3, model_channels=c["num_channels"], out_channels=6 if c["learn_sigma"] else 3,
        num_res_blocks=c["num_res_blocks"],
        attention_resolutions=tuple(size // int(r) for r in c["attention_resolutions"].split(",")),
        dropout=c.get("dropout", 0.0), channel_mult=tuple(float(m) for m in c["channel_mult"].split(",")),
        num_classes=c["classes"] if c["class_cond"] else None, num_heads=c["num_heads"],
        num_head_channels=c["num_head_channels"], use_scale_shift_norm=c["use_scale_shift_norm"],
        resblock_updown=c["resblock_updown"], use_new_attention_order=c["use_new_attention_order"],
    )  # fmt: skip
    unet.normalization = normalization
    return model


def exact_attention(unet, model):
    """The float32 module of consistency_models in place of its half-precision one; same order."""
    for m in model.modules():
        if isinstance(m, unet.AttentionBlock):
            m.attention = unet.QKVAttention(m.num_heads)
    return model


def case(name, model, config, sizes, call, seed):
    model = seeded(model, seed)
    config = {k: v for k, v in config.items() if k != "classes"}
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = {}, {}
    for prefix, (height, width) in sizes.items():
        x = torch.randn(2, 3, height, width, generator=generator)
        t = torch.tensor([3.0, 871.25]) if prefix == "" else torch.tensor([-412.5, 0.0])
        kept, hooks = {}, []
        places = [(f"encoder{i}", b) for i, b in enumerate(model.input_blocks)] + [("middle", model.middle_block)]
        for key, block in places:
            hooks.append(block.register_forward_hook(functools.partial(keep, kept, key)))
        y = torch.tensor([1, 4]) if config["class_cond"] else None
        with torch.no_grad():
            model.eval()
            out = model(x, t, y)
        if not config.get("dropout"):
            assert torch.equal(model.train()(x, t, y), out)  # dropout 0: training changes nothing
        for hook in hooks:
            hook.remove()
        inputs |= {f"{prefix}x": nhwc(x), f"{prefix}time": t} | ({} if y is None else {f"{prefix}labels": y.int()})
        outputs |= {f"{prefix}prediction": nhwc(out)} | {f"{prefix}{k}": nhwc(v) for k, v in kept.items()}
    save_case(name, model.state_dict(), config, inputs, outputs, call, ())


if __name__ == "__main__":
    adm, cm = reference(sys.argv[1], "guided_diffusion"), reference(sys.argv[2], "cm")
    base = {
        "image_size": 16, "num_channels": 4, "num_res_blocks": 1, "channel_mult": "1,2,2",
        "attention_resolutions": "8,4", "num_heads": 1, "num_head_channels": 4, "use_scale_shift_norm": True,
        "resblock_updown": True, "use_new_attention_order": False, "class_cond": True, "classes": 5,
        "learn_sigma": True, "dropout": 0.0, "norm_groups": 2,
    }  # fmt: skip
    call = "guided_diffusion.unet.UNetModel(...)(x, time, labels) at 22e0df81; 2 groups in all norms"
    case("adm_legacy", build(adm, base, 2), base, {"": (8, 8), "wide.": (4, 12)}, call, 1)
    new = base | {
        "channel_mult": "1,2", "num_res_blocks": 2, "attention_resolutions": "16", "num_heads": 2,
        "num_head_channels": -1, "use_scale_shift_norm": False, "resblock_updown": False,
        "use_new_attention_order": True, "class_cond": False, "learn_sigma": False, "dropout": 0.1,
    }  # fmt: skip
    case("adm_new", build(adm, new, 2), new, {"": (8, 8)}, call, 2)
    square = base | {"channel_mult": "1,1", "num_channels": 8, "attention_resolutions": "16,8"}
    case("adm_square", build(adm, square, 2), square, {"": (8, 8)}, call, 3)

    unet_defaults = list(cm.AttentionBlock.__init__.__defaults__)
    unet_defaults[unet_defaults.index("flash")] = "default"  # the kernel needs a GPU
    cm.AttentionBlock.__init__.__defaults__ = tuple(unet_defaults)
    flash = base | {"channel_mult": "1,2", "attention_resolutions": "8", "learn_sigma": False}
    call = "cm.unet.UNetModel(...)(x, time, labels) at e32b69ee, attention by its float32 QKVAttention; 2 groups"
    case("adm_flash", exact_attention(cm, build(cm, flash, 2)), flash, {"": (8, 8)}, call, 4)

    publications = {
        "adm-256-uncond": (adm, "256", False, 552_814_086, True, {}),
        "adm-64-class": (adm, "64", True, 296, True, {"new": True}),
        "consistency-imagenet64": (cm, "64", True, 296, False, {}),
        "consistency-bedroom256": (cm, "256", False, None, False, {"scale_shift": False}),
    }
    for name, (unet, size, classes, total, sigma, more) in publications.items():
        full = {
            "image_size": int(size), "num_channels": 192 if size == "64" else 256,
            "num_res_blocks": 3 if size == "64" else 2, "channel_mult": "1,2,3,4" if size == "64" else "1,1,2,2,4,4",
            "attention_resolutions": "32,16,8", "num_heads": 4, "num_head_channels": 64,
            "use_scale_shift_norm": more.get("scale_shift", True), "resblock_updown": True,
            "use_new_attention_order": more.get("new", False), "class_cond": classes, "classes": 1000,
            "learn_sigma": sigma,
        }  # fmt: skip
        with torch.device("meta"):
            model = build(unet, full)
        counted = sum(p.numel() for p in model.parameters())
        assert total in (None, counted, round(counted / 1e6)), (name, counted, total)
        source = f"{unet.__name__}.UNetModel with the flags of its README, counted on the meta device"
        save_keys(name, "openai-unet", model, None, counted, source)
