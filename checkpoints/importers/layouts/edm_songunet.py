"""``SongUNet`` of NVlabs/edm (DDPM++ and NCSN++) -> :class:`zoo.nn.song_unet.SongUNet`.

The official files are pickles of classes, which no importer should open.  Write the weights out first, with a checkout
of NVlabs/edm on the path:

    import pickle, torch
    with open("edm-cifar10-32x32-uncond-vp.pkl", "rb") as f:
        torch.save(pickle.load(f)["ema"].model.state_dict(), "edm-cifar10-32x32-uncond-vp.pt")

The shapes tell everything but dropout.  Filters of two taps are taken to be (1, 1) and those of four (1, 3, 3, 1), as
in all published models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from checkpoints.importers.layout import ImporterError, Layout, Shapes, depth
from checkpoints.importers.rules import LINEAR, Reshape, Rule, Split, Transpose, conv2d, linear, norm
from zoo.nn.song_unet import SongUNet, SongUNetConfig

FILTERS = {2: (1, 1), 4: (1, 3, 3, 1)}
IDLE = {"use_fp16", "sigma_min", "sigma_max", "sigma_data", "class_name", "channel_mult_emb", "channel_mult_noise"}
"""Arguments of the preconditioning, and what the weights' own shapes say."""


def walk(c: SongUNetConfig) -> Iterator[tuple[str, str, int]]:
    """(place in the source, name in the module, channels) of every residual block."""
    for level, width in enumerate(c.widths):
        side = c.image_size >> level
        if level:
            yield f"enc.{side}x{side}_down", f"encoder{level}_down", c.widths[level - 1]
        for i in range(c.num_blocks):
            yield f"enc.{side}x{side}_block{i}", f"encoder{level}_block{i}", width
    for i in range(2):
        yield f"dec.{side}x{side}_in{i}", f"middle_block{i}", c.widths[-1]
    for level, width in reversed(list(enumerate(c.widths))):
        side = c.image_size >> level
        if level < len(c.widths) - 1:
            yield f"dec.{side}x{side}_up", f"decoder{level}_up", c.widths[level + 1]
        for i in range(c.num_blocks + 1):
            yield f"dec.{side}x{side}_block{i}", f"decoder{level}_block{i}", width


def rules(module: SongUNet) -> list[Rule]:
    """The table."""
    c = module.config
    table = [
        *conv2d(f"enc.{c.image_size}x{c.image_size}_conv", "conv_in"),
        *linear("map_layer0", "noise/first"),
        *linear("map_layer1", "noise/second"),
        *linear("map_label", "label"),
        Rule("map_augment.weight", "augment/kernel", LINEAR),
        Rule("map_noise.freqs", "constants/frequencies"),
    ]
    for level in range(len(c.widths)):
        side = c.image_size >> level
        aux = "aux_skip" if c.encoder == "skip" else "aux_residual"
        table += conv2d(f"enc.{side}x{side}_{aux}", f"encoder{level}_aux")
        table += norm(f"dec.{side}x{side}_aux_norm", f"decoder{level}_norm_out")
        table += conv2d(f"dec.{side}x{side}_aux_conv", f"decoder{level}_conv_out")
    for source, target, width in walk(c):
        table += norm(f"{source}.norm0", f"{target}/norm1")
        table += conv2d(f"{source}.conv0", f"{target}/conv1")
        table += linear(f"{source}.affine", f"{target}/condition")
        table += norm(f"{source}.norm1", f"{target}/norm2")
        table += conv2d(f"{source}.conv1", f"{target}/conv2")
        table += conv2d(f"{source}.skip", f"{target}/skip")
        table += attention(source, f"{target}_attention", width)
    return table


def attention(source: str, target: str, width: int) -> list[Rule]:
    """One head, whose queries, keys and values alternate channel by channel."""
    parts = [f"{target}/attention/{part}" for part in ("query", "key", "value")]
    apart = Transpose((1, 0, 2)), Reshape((3, width, width), (3 * width, width)), LINEAR, Split(1, 3)
    bias = Reshape((3 * width,), (width, 3)), LINEAR, Reshape((3, width), (3 * width,)), Split(0, 3)
    return [
        *norm(f"{source}.norm2", f"{target}/norm"),
        Rule(
            f"{source}.qkv.weight",
            tuple(f"{p}/kernel" for p in parts),
            (Reshape((3 * width, width, 1, 1), (width, 3, width)), *apart),
        ),
        Rule(f"{source}.qkv.bias", tuple(f"{p}/bias" for p in parts), bias),
        Rule(
            f"{source}.proj.weight",
            f"{target}/attention/out/kernel",
            (Reshape((width, width, 1, 1), (width, width)), LINEAR),
        ),
        Rule(f"{source}.proj.bias", f"{target}/attention/out/bias"),
    ]


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> SongUNet:
    """From the shapes; a config (the original keyword arguments) adds dropout, and must otherwise agree."""
    sides = {int(n.split(".")[1].split("x")[0]) for n in shapes if n.startswith("enc.")}
    size, levels = max(sides), len(sides)
    if sides != {size >> level for level in range(levels)}:
        raise ImporterError(f"resolutions {sorted(sides)} are not halves of one another")
    at = lambda level: f"enc.{size >> level}x{size >> level}"  # noqa: E731
    has = lambda name: any(n.startswith(name) for n in shapes)  # noqa: E731
    needed = [f"{at(0)}_conv.weight", f"dec.{size}x{size}_aux_conv.weight"]
    needed += [f"{at(level)}_block0.conv1.weight" for level in range(levels)]
    if lost := [n for n in needed if n not in shapes]:
        raise ImporterError(f"{', '.join(lost)} missing: without these the shapes do not tell the network")
    stem = shapes[f"{at(0)}_conv.weight"].shape
    taps = {x.shape[-1] for n, x in shapes.items() if n.endswith(".resample_filter")}
    taps = taps or {len((config or {}).get("resample_filter", ()))}
    if len(taps) > 1 or not taps <= set(FILTERS):
        raise ImporterError(
            f"resampling filters of {sorted(taps)} taps are not supported, only of 2 or 4; where the weights hold no "
            '*.resample_filter, give {"resample_filter": [1, 1]} as JSON with --config FILE'
        )
    encoder = "skip" if has(f"{at(1)}_aux_skip") else "residual" if has(f"{at(1)}_aux_residual") else "standard"
    last = f"dec.{size >> (levels - 1)}x{size >> (levels - 1)}"
    c = SongUNetConfig(
        image_size=size, in_channels=stem[1], out_channels=shapes[f"dec.{size}x{size}_aux_conv.weight"].shape[0],
        base_width=stem[0], widths=tuple(shapes[f"{at(k)}_block0.conv1.weight"].shape[0] for k in range(levels)),
        num_blocks=depth(shapes, f"{at(0)}_block{{i}}."),
        attention_factors=tuple(2**k for k in range(levels) if has(f"{at(k)}_block0.qkv")),
        embedding="fourier" if "map_noise.freqs" in shapes else "positional",
        noise_width=shapes["map_layer0.weight"].shape[1], embedding_width=shapes["map_layer0.weight"].shape[0],
        encoder=encoder, decoder="skip" if levels > 1 and has(f"{last}_aux_conv") else "standard",
        filter=FILTERS[taps.pop()],
        num_classes=shapes["map_label.weight"].shape[1] if "map_label.weight" in shapes else 0,
        augment_width=shapes["map_augment.weight"].shape[1] if "map_augment.weight" in shapes else 0,
    )  # fmt: skip
    config = dict(config or {})
    rates = {k: float(config.pop(k)) for k in ("dropout", "label_dropout") if k in config}
    module = SongUNet(dataclasses.replace(c, **rates))
    says = to_config(module)
    if "img_channels" in config:
        config["in_channels"] = config.pop("img_channels")
    for key, value in config.items():
        if key not in IDLE and key not in says:
            raise ImporterError(f"config {key} is no argument of SongUNet; there are {sorted(says)}")
        value = list(value) if isinstance(value, tuple) else value
        if key == "attn_resolutions":
            value = [s for s in value if s in sides]
        if key not in IDLE and value != says[key]:
            raise ImporterError(f"config {key} = {value!r}, but the weights say {says[key]!r}")
    return module


def to_config(module: SongUNet) -> dict[str, Any]:
    """The keyword arguments of the original class."""
    c = module.config
    return {
        "model_type": "SongUNet", "img_resolution": c.image_size, "in_channels": c.in_channels,
        "out_channels": c.out_channels, "label_dim": c.num_classes, "augment_dim": c.augment_width,
        "model_channels": c.base_width, "channel_mult": [w // c.base_width for w in c.widths],
        "channel_mult_emb": c.embedding_width // c.base_width, "num_blocks": c.num_blocks,
        "attn_resolutions": [c.image_size // f for f in c.attention_factors], "dropout": c.dropout,
        "label_dropout": c.label_dropout, "embedding_type": c.embedding,
        "channel_mult_noise": c.noise_width // c.base_width, "encoder_type": c.encoder, "decoder_type": c.decoder,
        "resample_filter": list(c.filter),
    }  # fmt: skip


def new_buffers(module: SongUNet, _: Any = None) -> dict[str, np.ndarray]:
    """Resampling filters, one beside each convolution that halves or doubles the size."""
    c = module.config
    taps = np.asarray(c.filter, np.float32)
    kernel = (np.outer(taps, taps) / taps.sum() ** 2)[None, None]
    places = []
    for level in range(len(c.widths)):
        side = c.image_size >> level
        places += [f"enc.{side}x{side}_down.{part}" for part in ("conv0", "skip") if level]
        places += [f"dec.{side}x{side}_up.{part}" for part in ("conv0", "skip") if level < len(c.widths) - 1]
        if level and c.encoder != "standard":
            places.append(f"enc.{side}x{side}_aux_{'down' if c.encoder == 'skip' else 'residual'}")
        if level < len(c.widths) - 1 and c.decoder == "skip":
            places.append(f"dec.{side}x{side}_aux_up")
    return {f"{place}.resample_filter": kernel for place in places}


def preprocessing(config: Mapping[str, Any] | None, _: Any = None) -> dict[str, Any]:
    """Pixels in -1..1."""
    size = {"size": (config["img_resolution"],) * 2} if config and "img_resolution" in config else {}
    return {"mean": (0.5,) * 3, "std": (0.5,) * 3, **size}


LAYOUT = Layout(
    name="edm-songunet",
    title="NVlabs/edm SongUNet (DDPM++, NCSN++; a state dict written from the pickle)",
    configure=configure,
    rules=rules,
    model_types=("SongUNet",),
    signature=(
        "map_layer0.weight", "map_layer1.weight", "enc.{i}x{i}_conv.weight", "enc.{i}x{i}_block0.conv0.weight",
        "dec.{i}x{i}_aux_norm.weight", "dec.{i}x{i}_aux_conv.weight",
    ),
    buffers=("*.resample_filter",),
    new_buffers=new_buffers,
    to_config=to_config,
    preprocessing=preprocessing,
)  # fmt: skip
