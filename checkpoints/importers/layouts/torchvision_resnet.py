"""torchvision's ResNet: ``layer{s}.{b}.conv1.weight``.

timm's plain and "d" variants use the same names, and so do continual-learning codes (PyCIL's ResNet-18) whose small
stem is a ``Sequential`` of convolution and normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, batch_counters, depth
from checkpoints.importers.rules import Rule, batch_norm, conv2d, linear
from zoo.nn.resnet import ResNet, ResNetConfig

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> ResNet:
    """All is in the shapes; a timm config adds the name of a variant, of which the unsupported ones are refused."""
    architecture = str((config or {}).get("architecture", "resnet"))
    if config and not architecture.removesuffix("d").removeprefix("resnet").isdigit():
        raise ImporterError(f"config architecture = {architecture!r} is not supported; only resnetN and resnetNd are")
    said = {**(config or {}), **((config or {}).get("model_args") or {})}
    for entry in sorted(set(said.get("model_args") or {}) - {"num_classes", "in_chans", "global_pool"}):
        raise ImporterError(f"config model_args: {entry} = {said[entry]!r} is not supported; only its default is")
    if said.get("global_pool") not in (None, "", "avg"):
        raise ImporterError(f"config global_pool = {said['global_pool']!r} is not supported; only 'avg' is")
    if any(".se." in n or ".conv1_1x1." in n for n in shapes) or _groups(shapes):
        raise ImporterError("grouped or squeeze-and-excitation ResNets (ResNeXt, SE-ResNet) are not supported")
    stages = depth(shapes, "layer{i}.") - 1
    widths = tuple(shapes[f"layer{s}.0.conv1.weight"].shape[0] for s in range(1, stages + 1))
    deep = "conv1.6.weight" in shapes
    sequential = "conv1.0.weight" in shapes
    stem = shapes["conv1.6.weight" if deep else "conv1.0.weight" if sequential else "conv1.weight"].shape
    if not deep and stem[2] not in (3, 7):
        raise ImporterError(f"a stem of kernel {stem[2]} is not supported; 7 (ImageNet) and 3 (CIFAR) are")
    average_down = any(n.endswith("downsample.2.weight") for n in shapes)
    return ResNet(
        ResNetConfig(
            blocks=tuple(depth(shapes, f"layer{s}.{{i}}.") for s in range(1, stages + 1)),
            widths=widths,
            block="bottleneck" if "layer1.0.conv3.weight" in shapes else "basic",
            stem="deep" if deep else "imagenet" if stem[2] == 7 else "cifar",
            stem_width=stem[0],
            average_down=average_down,
            classes=shapes["fc.weight"].shape[0] if "fc.weight" in shapes else 0,
        )
    )


def rules(module: ResNet) -> tuple[Rule, ...]:
    """The table."""
    block = "layer{s}.{b}"
    ours = "stage{s}_block{b}"
    parts = {"1": "first", "2": "second", "3": "third"}
    down = 1 if module.config.average_down else 0
    deep = module.config.stem == "deep"
    # convolutions and norms of a stem that is a Sequential: timm's deep one, or a continual-learning code's small one
    stem = {"0": "stem1", "3": "stem2", "6": "stem3"} if deep else {"0": "stem"}
    return (
        *conv2d("conv1", "stem/conv"),
        *batch_norm("bn1", "stem3/norm" if deep else "stem/norm"),
        *(r for k, name in stem.items() for r in conv2d(f"conv1.{k}", f"{name}/conv")),
        *batch_norm("conv1.1", stem["0"] + "/norm"),
        *batch_norm("conv1.4", "stem2/norm"),
        *(r for k, name in parts.items() for r in conv2d(f"{block}.conv{k}", f"{ours}/{name}/conv")),
        *(r for k, name in parts.items() for r in batch_norm(f"{block}.bn{k}", f"{ours}/{name}/norm")),
        *conv2d(f"{block}.downsample.{down}", f"{ours}/shortcut/conv"),
        *batch_norm(f"{block}.downsample.{down + 1}", f"{ours}/shortcut/norm"),
        *linear("fc", "head"),
    )


def preprocessing(config: Mapping[str, Any] | None, _: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A timm config says; torchvision's files say nothing, and its published weights share one recipe."""
    said = (config or {}).get("pretrained_cfg") or {}
    size = tuple(said.get("input_size", (3, 224, 224))[1:])
    return {
        "size": size,
        "mean": tuple(said.get("mean", IMAGENET["mean"])),
        "std": tuple(said.get("std", IMAGENET["std"])),
        "interpolation": said.get("interpolation", "bilinear"),
        "crop": said.get("crop_pct", 224 / 256),
    }


def _groups(shapes: Shapes) -> bool:
    # a grouped 3 x 3 convolution sees fewer channels than the one before it makes
    first, second = "layer1.0.conv1.weight", "layer1.0.conv2.weight"
    return first in shapes and second in shapes and shapes[second].shape[1] != shapes[first].shape[0]


LAYOUT = Layout(
    name="torchvision-resnet",
    title="ResNet of torchvision and timm (18 to 152, deep stems and average-pooled shortcuts)",
    configure=configure,
    rules=rules,
    model_types=("resnet",),
    signature=("layer1.0.conv1.weight", "layer1.0.bn2.running_var"),
    absent=("layer{s}.{b}.shortcut.*", "linear.weight", "attnpool.*", "visual.*"),
    buffers=("*.num_batches_tracked",),
    new_buffers=batch_counters,
    preprocessing=preprocessing,
)
