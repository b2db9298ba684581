"""PyCIL's CIFAR ResNets (20, 32, ...): ``stage_{s}.{b}.conv_a.weight``, shortcuts without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import Layout, Shapes, batch_counters, depth
from checkpoints.importers.rules import Rule, batch_norm, conv2d, linear
from zoo.nn.resnet import ResNet, ResNetConfig


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> ResNet:
    """All is in the shapes."""
    stages = depth(shapes, "stage_{i}.") - 1
    return ResNet(
        ResNetConfig(
            blocks=tuple(depth(shapes, f"stage_{s}.{{i}}.") for s in range(1, stages + 1)),
            widths=tuple(shapes[f"stage_{s}.0.conv_a.weight"].shape[0] for s in range(1, stages + 1)),
            stem_width=shapes["conv_1_3x3.weight"].shape[0],
            shortcut="append",
            classes=shapes["fc.weight"].shape[0] if "fc.weight" in shapes else 0,
        )
    )


def rules(module: ResNet) -> tuple[Rule, ...]:
    """The table."""
    block, ours = "stage_{s}.{b}", "stage{s}_block{b}"
    return (
        *conv2d("conv_1_3x3", "stem/conv"),
        *batch_norm("bn_1", "stem/norm"),
        *conv2d(f"{block}.conv_a", f"{ours}/first/conv"),
        *batch_norm(f"{block}.bn_a", f"{ours}/first/norm"),
        *conv2d(f"{block}.conv_b", f"{ours}/second/conv"),
        *batch_norm(f"{block}.bn_b", f"{ours}/second/norm"),
        *linear("fc", "head"),
    )


LAYOUT = Layout(
    name="pycil-resnet",
    title="CIFAR ResNets of PyCIL (20, 32, 44, 56, 110)",
    configure=configure,
    rules=rules,
    signature=("conv_1_3x3.weight", "bn_1.weight", "stage_1.0.conv_a.weight"),
    prefixes=("convnet.", "backbone."),
    buffers=("*.num_batches_tracked",),
    new_buffers=batch_counters,
)
