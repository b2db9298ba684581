"""Golden cases of Stable Diffusion's U-Net and autoencoder, from diffusers.

python tests/golden/make/diffusers.py
"""

import functools
import sys
from pathlib import Path

sys.path = [
    p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent
]  # named like the library
import torch  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
from common import save_case, save_keys, seeded  # noqa: E402

torch.set_num_threads(1)
torch.manual_seed(0)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def plain(model):
    return {k: v for k, v in model.config.items() if not k.startswith("_")} | {"_class_name": type(model).__name__}


def keep(kept, key, _, __, out):
    """A hook; a block down gives its result and all its skips."""
    kept[key] = list(out[1]) if isinstance(out, tuple) else [out]


def unet_case(name, config, sizes, seed):
    model = seeded(UNet2DConditionModel(**config), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = {}, {}
    for prefix, (height, width, tokens) in sizes.items():
        x = torch.randn(2, model.config.in_channels, height, width, generator=generator)
        context = torch.randn(2, tokens, model.config.cross_attention_dim, generator=generator)
        time = torch.tensor([7.0, 981.0])
        mask, settings = torch.ones(2, tokens, dtype=torch.bool), {}
        mask[1, tokens // 2 :] = False
        if prefix:
            inputs[f"{prefix}padding_mask"] = settings["encoder_attention_mask"] = mask
        kept, hooks = {}, []
        places = [("in", model.conv_in), *((f"down{i}", b) for i, b in enumerate(model.down_blocks))]
        for key, block in [*places, ("middle", model.mid_block)]:
            hooks.append(block.register_forward_hook(functools.partial(keep, kept, key)))
        with torch.no_grad():
            out = model(x, time, context, **settings).sample
            assert torch.equal(
                model.train()(x, time, context, **settings).sample, out
            )  # dropout 0: training changes nothing
            model.eval()
        features = [f for key, _ in places for f in kept[key]]
        outputs |= {f"{prefix}prediction": nhwc(out), f"{prefix}middle": nhwc(kept["middle"][0])}
        outputs |= {f"{prefix}encoder{i}": nhwc(f) for i, f in enumerate(features)}
        for hook in hooks:
            hook.remove()
        inputs |= {f"{prefix}x": nhwc(x), f"{prefix}time": time, f"{prefix}context": context}
    call = "UNet2DConditionModel(x, time, context); odd.*: with encoder_attention_mask=padding_mask"
    save_case(name, model.state_dict(), plain(model), inputs, outputs, call, "diffusers")


def vae_case(name, config, sizes, seed, old=False):
    model = seeded(AutoencoderKL(**config), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = {}, {}
    for prefix, (height, width) in sizes.items():
        x = torch.randn(2, 3, height, width, generator=generator)
        with torch.no_grad():
            latents = model.encode(x).latent_dist
            image = model.decode(latents.mean).sample
            assert torch.allclose(model.train().decode(latents.mean).sample, image, 1e-5, 1e-6)
            model.eval()
        inputs[f"{prefix}x"] = nhwc(x)
        outputs |= {
            f"{prefix}mean": nhwc(latents.mean), f"{prefix}logvar": nhwc(latents.logvar), f"{prefix}image": nhwc(image)
        }  # fmt: skip
    call = "model.encode(x).latent_dist -> mean, logvar; model.decode(mean).sample -> image"
    state = model.state_dict()
    if old:
        call += "; attention keys renamed to those of older files"
        state = {renamed(k): v for k, v in state.items()}
    save_case(name, state, plain(model), inputs, outputs, call, "diffusers")


def renamed(key):
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


if __name__ == "__main__":
    base = {
        "sample_size": 8, "in_channels": 4, "out_channels": 3, "block_out_channels": (4, 8), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 2, "cross_attention_dim": 6,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2,
    }  # fmt: skip
    unet_case("sd_conv", base, {"": (8, 8, 5), "odd.": (5, 6, 7)}, 1)
    linear = base | {
        "attention_head_dim": (1, 4), "use_linear_projection": True, "upcast_attention": True, "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "flip_sin_to_cos": False, "freq_shift": 1,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "center_input_sample": True, "norm_eps": 1e-3,
        "transformer_layers_per_block": 2, "block_out_channels": (4, 4),
    }  # fmt: skip
    unet_case("sd_linear", linear, {"": (8, 8, 5)}, 2)
    square = base | {"block_out_channels": (8, 8), "cross_attention_dim": 8, "layers_per_block": 1}
    unet_case("sd_square", square, {"": (4, 4, 5)}, 3)

    vae = {
        "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 8,
        "scaling_factor": 0.3,
    }  # fmt: skip
    vae_case("vae_new", vae, {"": (8, 8), "wide.": (4, 6)}, 4)
    vae_case("vae_old", vae | {"block_out_channels": (8, 8), "layers_per_block": 2}, {"": (8, 8)}, 5, old=True)
    bare = {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "shift_factor": 0.1,
    }
    vae_case("vae_bare", vae | bare, {"": (4, 4)}, 6)

    sd15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    sd21 = {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True, "upcast_attention": True,
    }  # fmt: skip
    for name, config, total in (("sd-1.5-unet", sd15, 859_520_964), ("sd-2.1-unet", sd21, 865_910_724)):
        with torch.device("meta"):
            model = UNet2DConditionModel(**config)
        assert sum(p.numel() for p in model.parameters()) == total
        source = "counted from diffusers' UNet2DConditionModel on the meta device"
        save_keys(name, "diffusers-unet", model, plain(model), total, source)
    sd_vae = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoencoderKL(**sd_vae)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    old = {renamed(k): list(v.shape) for k, v in model.state_dict().items()}
    source = (
        "counted from diffusers' AutoencoderKL on the meta device; the attention's names are those of the hub's files"
    )
    save_keys("sd-vae", "diffusers-vae", old, plain(model), 83_653_863, source)
