"""CIFAR ResNets with ``shortcut`` blocks: mammoth's ResNet-18 and its kin, and the 20, 32 and 56 of He et al."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import Layout, Shapes, batch_counters, depth
from checkpoints.importers.rules import Rule, batch_norm, conv2d, linear
from zoo.nn.resnet import ResNet, ResNetConfig


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> ResNet:
    """All is in the shapes: where the width changes without a ``shortcut`` convolution, channels are padded."""
    stages = depth(shapes, "layer{i}.") - 1
    head = next((shapes[n].shape[0] for n in ("linear.weight", "classifier.weight") if n in shapes), 0)
    return ResNet(
        ResNetConfig(
            blocks=tuple(depth(shapes, f"layer{s}.{{i}}.") for s in range(1, stages + 1)),
            widths=tuple(shapes[f"layer{s}.0.conv1.weight"].shape[0] for s in range(1, stages + 1)),
            block="bottleneck" if "layer1.0.conv3.weight" in shapes else "basic",
            stem="cifar",
            stem_width=shapes["conv1.weight"].shape[0],
            shortcut="project" if "layer2.0.shortcut.0.weight" in shapes else "pad",
            classes=head,
        )
    )


def rules(module: ResNet) -> tuple[Rule, ...]:
    """The table."""
    block, ours = "layer{s}.{b}", "stage{s}_block{b}"
    parts = {"1": "first", "2": "second", "3": "third"}
    return (
        *conv2d("conv1", "stem/conv"),
        *batch_norm("bn1", "stem/norm"),
        *(r for k, name in parts.items() for r in conv2d(f"{block}.conv{k}", f"{ours}/{name}/conv")),
        *(r for k, name in parts.items() for r in batch_norm(f"{block}.bn{k}", f"{ours}/{name}/norm")),
        *conv2d(f"{block}.shortcut.0", f"{ours}/shortcut/conv"),
        *batch_norm(f"{block}.shortcut.1", f"{ours}/shortcut/norm"),
        *linear("linear", "head"),
        *linear("classifier", "head"),
    )


LAYOUT = Layout(
    name="cifar-resnet",
    title="CIFAR ResNets of continual-learning codes (mammoth's ResNet-18; 20, 32 and 56 with padded shortcuts)",
    configure=configure,
    rules=rules,
    signature=("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.0.bn2.running_var"),
    absent=("layer{s}.{b}.downsample.*", "fc.weight", "attnpool.*"),
    prefixes=("net.", "backbone."),
    buffers=("*.num_batches_tracked",),
    new_buffers=batch_counters,
)
