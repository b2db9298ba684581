"""Golden cases of DDPM++ and NCSN++, from the official repository (no package: give a checkout).

git clone https://github.com/NVlabs/edm A
python tests/golden/make/song_unet.py A
"""

import functools
import importlib
import sys
import types

import torch
from common import save_case, save_keys, seeded

torch.set_num_threads(1)
torch.manual_seed(0)
COMMIT = "008a4e53"


def reference(folder):
    sys.path.insert(0, folder)
    # its decorator records source code for pickles: not needed
    package, inner = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    inner.persistent_class = lambda c: c
    package.persistence = inner
    sys.modules |= {"torch_utils": package, "torch_utils.persistence": inner}
    return importlib.import_module("training.networks")


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def keep(kept, key, _, __, out):
    kept[key] = out


def keep_input(kept, key, _, inputs):
    kept[key] = inputs[0]


def case(name, networks, settings, sizes, seed, precond=False):
    full = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "dropout": 0.0, **settings}
    model = networks.SongUNet(**full)
    filters = {k: v.clone() for k, v in model.named_buffers() if k.endswith("resample_filter")}
    model = seeded(model, seed).eval()
    for key, buffer in model.named_buffers():
        if key in filters:
            buffer.copy_(filters[key])  # these are no weights
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = {}, {}
    for prefix, (height, width) in sizes.items():
        x = torch.randn(2, 3, height, width, generator=generator)
        noise = torch.tensor([-1.3, 1.09])
        labels = torch.tensor([2, 0] if prefix == "" else [-1, 1])
        one_hot = torch.nn.functional.one_hot(labels + 1, 4)[:, 1:].float()  # 3 classes, where there are any
        augment = torch.randn(2, full.get("augment_dim", 0), generator=generator) if prefix == "" else None
        kept, hooks = {}, []
        for key, block in model.enc.items():
            hooks.append(block.register_forward_hook(functools.partial(keep, kept, key)))
            # what follows a block down: its result, joined by the auxiliary path
            if key.endswith("_block0"):
                joined = functools.partial(keep_input, kept, key.replace("block0", "joined"))
                hooks.append(block.register_forward_pre_hook(joined))
        for key, block in model.dec.items():
            if key.endswith("_in1"):
                hooks.append(block.register_forward_hook(functools.partial(keep, kept, "middle")))
        with torch.no_grad():
            out = model(x, noise, one_hot, augment)
            if not full.get("label_dropout"):
                assert torch.allclose(model.train()(x, noise, one_hot, augment), out, 1e-5, 1e-6)
                model.eval()
        for hook in hooks:
            hook.remove()
        encoder = [kept[k.replace("_down", "_joined")] for k in model.enc if "aux" not in k]
        outputs |= {f"{prefix}encoder{i}": nhwc(f) for i, f in enumerate(encoder)}
        outputs |= {f"{prefix}prediction": nhwc(out), f"{prefix}middle": nhwc(kept["middle"])}
        inputs |= {f"{prefix}x": nhwc(x), f"{prefix}noise": noise}
        if full.get("label_dim"):
            inputs[f"{prefix}labels"] = labels.int()
        if full.get("augment_dim") and augment is not None:
            inputs[f"{prefix}augment"] = augment
    call = f"training.networks.SongUNet(**config)(x, noise, one-hot labels (-1: zeros), augment), at {COMMIT}"
    if precond:
        model.eval()
        whole = networks.EDMPrecond(8, 3, model_type="SongUNet", label_dim=full.get("label_dim", 0), **{
            k: v for k, v in settings.items() if k != "label_dim"
        })  # fmt: skip
        whole.model = model
        sigma = torch.tensor([0.03, 40.0])
        x = 40 * torch.randn(2, 3, 8, 8, generator=generator)
        one_hot = torch.nn.functional.one_hot(torch.tensor([2, 0]), 3).float()
        with torch.no_grad():
            outputs["denoised"] = nhwc(whole(x, sigma, one_hot))
        inputs |= {"denoise.x": nhwc(x), "denoise.sigma": sigma}
        call += "; denoised: EDMPrecond.forward(denoise.x, denoise.sigma, labels)"
    save_case(name, model.state_dict(), None, inputs, outputs, call, ())


if __name__ == "__main__":
    networks = reference(sys.argv[1])
    small = {"model_channels": 4, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    ddpm = small | {"label_dim": 3, "augment_dim": 2, "channel_mult": [1, 2, 2]}
    case("song_ddpmpp", networks, ddpm, {"": (8, 8), "wide.": (4, 12)}, 1, precond=True)
    ncsn = small | {
        "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual", "channel_mult": [2, 1, 1],
        "resample_filter": [1, 3, 3, 1], "augment_dim": 2,
    }  # fmt: skip
    case("song_ncsnpp", networks, ncsn, {"": (8, 8)}, 2)
    skip = small | {
        "encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1], "label_dim": 3,
        "attn_resolutions": [], "channel_mult_emb": 2, "num_blocks": 2, "channel_mult": [1, 1, 2],
    }  # fmt: skip
    case("song_skip", networks, skip, {"": (8, 8)}, 3)
    square = small | {"model_channels": 8, "channel_mult": [1, 1], "attn_resolutions": [8, 4], "channel_mult_emb": 1}
    case("song_square", networks, square, {"": (8, 8)}, 4)

    cifar = {
        "img_resolution": 32, "in_channels": 3, "out_channels": 3, "augment_dim": 9, "model_channels": 128,
        "channel_mult": [2, 2, 2],
    }  # fmt: skip
    more = {
        "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
    }  # fmt: skip
    for name, settings, millions in (("edm-cifar10-ddpmpp", cifar, 56), ("edm-cifar10-ncsnpp", cifar | more, 56)):
        # on the CPU: the class wraps NumPy arrays into tensors, which the meta device does not take
        model = networks.SongUNet(**settings)
        counted = sum(p.numel() for p in model.parameters())
        print(name, counted)
        assert round(counted / 1e6) == millions, counted
        source = "parameters of training.networks.SongUNet with train.py's settings (augmented, unconditional), counted"
        save_keys(name, "edm-songunet", model, None, counted, source)
