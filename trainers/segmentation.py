"""Weakly supervised segmentation: a U-Net learns proxy masks made from a trained network's maps, and is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from data.dataset import Dataset
from data.stream import training_stream
from trainers.errors import UserError
from trainers.phases import Fit, FitResult, Phase, Train
from trainers.subspaces import image_embedder
from zoo.base import Loss, Objective, example_elements
from zoo.losses.segmentation import dice_ce
from zoo.nn.unet import UNet
from zoo.objectives import apply_module, init_module
from zoo.ops.segmentation import dice, proxy_mask

Maps = Callable[[Mapping[str, Any], np.ndarray], np.ndarray]
"""``(variables, images [N, H, W, C]) -> maps [N, h, w, 1]``, on the host."""
ASIDE = "aside"
"""The collection of the network that is not being trained: the encoder while the U-Net learns, then the U-Net."""
PROXIES = "proxies"
"""The artefact of proxy masks, bool ``[N, H, W]``, by the training images' index."""


def mask_objective(module: nn.Module, inputs: str = "x") -> Objective:
    """Dice and cross-entropy against the artefact :data:`PROXIES`; the loss reads no label of the batch.

    Args:
      module: images to one logit a place ``[B, H, W, 1]``, without running statistics.
      inputs: batch field.
    """

    def init(rng, batch):
        variables = init_module(module, rng, batch, batch[inputs])
        if set(variables) != {"params"}:
            raise ValueError(f"a segmentation network needs parameters only, got {', '.join(sorted(variables))}")
        return variables

    def forward(variables, batch, context):
        own = {"params": variables["params"]}
        logits, _ = apply_module(module, own, batch[inputs], batch=batch, context=context)
        return {"logits": logits[..., 0]}, {}

    def loss(outputs, batch, context):
        target = jnp.take(context.artefacts[PROXIES], batch["index"], axis=0, mode="clip")
        return Loss(example_elements(dice_ce(outputs["logits"], target), batch))

    return Objective(
        init, forward, loss, provides=("logits", "index"), gathers=("index",), name="segmentation by proxy masks"
    )


def check_segmentation(steps: int | None, widths: tuple[int, ...], has_maps: bool) -> None:
    """Checks --segment-steps and --segment-widths.

    Raises:
      UserError: fewer than 0 steps, steps without maps, or no width or one below 1.
    """
    if steps is not None and steps < 0:
        raise UserError(f"--segment-steps must be at least 0, got {steps}")
    if steps and not has_maps:
        raise UserError(
            f"--segment-steps {steps} with --no-attention: there are no maps to make masks of; leave out one of them"
        )
    if not widths or min(widths) < 1:
        raise UserError(f"--segment-widths: expected one or more widths, each at least 1, got {widths}")


def segmentation_phases(
    data: Dataset,
    maps: Maps,
    module: nn.Module,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    seed: int = 0,
) -> list[Phase]:
    """Proxy masks of the training images, a network that learns them, and its Dice on the test split.

    No true mask is trained on.  The phases before leave the encoder as ``params``; it stands aside while the network
    learns, is ``params`` again at the end, and the network is then the collection :data:`ASIDE`.

    Args:
      data: with a test split; if that has masks, Dice is reported: ``dice`` of the network and ``proxy_dice`` of proxy
        masks of the same images.  Without, only ``foreground``, the share of places that the network marks.
      maps: of the encoder.
      module: the network, see :func:`mask_objective`.
      steps, learning_rate, batch_size, seed: of its training by Adam.
    """
    host, train, test = mask_objective(module), data["train"]["x"], data["test"]
    stream = training_stream({"x": train}, min(batch_size, len(train)), seed)

    tx = optax.adam(learning_rate)

    def propose(variables: Mapping, artefacts: Mapping, rng: Any) -> FitResult:
        found = proxy_mask(jnp.asarray(maps(variables, train)), train.shape[1:3])
        network = host.init(rng, {"x": jnp.asarray(train[:1])})
        return FitResult({"params": network["params"], ASIDE: variables["params"]}, {PROXIES: np.asarray(found)})

    def measure(variables: Mapping, artefacts: Mapping, rng: Any) -> FitResult:
        encoder = {c: v for c, v in variables.items() if c != ASIDE} | {"params": variables[ASIDE]}
        predicted = predicted_masks(module, variables["params"], test["x"])
        metrics = {"foreground": float(predicted.mean())}
        if "mask" in test:
            proxies = proxy_mask(jnp.asarray(maps(encoder, test["x"])), predicted.shape[1:])
            metrics |= {"dice": mean_dice(predicted, test["mask"]), "proxy_dice": mean_dice(proxies, test["mask"])}
        return FitResult({"params": variables[ASIDE], ASIDE: variables["params"]}, metrics=metrics)

    return [Fit(PROXIES, propose), Train("segment", steps, host, tx, stream), Fit("segmentation", measure)]


def predicted_masks(module: nn.Module, params: Mapping[str, Any], images: np.ndarray) -> np.ndarray:
    """Masks ``[N, H, W]`` where a segmentation network gives the foreground more than one half."""
    return image_embedder(mask_objective(module))({"params": params}, images)["logits"] > 0


def mean_dice(predicted: Any, truth: np.ndarray) -> float:
    """Mean Dice coefficient of masks ``[N, H, W]`` over images."""
    return float(jnp.mean(dice(jnp.asarray(predicted), jnp.asarray(truth))))


def segmentation_summary(metrics: Mapping[str, float], what: str) -> str:
    """What a run's summary says of it; nothing if there was none.

    Args:
      metrics: the run's.
      what: what the proxy masks are made of.
    """
    if "segmentation/foreground" not in metrics:
        return ""
    if "segmentation/dice" not in metrics:
        return ", U-Net taught by proxy masks (no Dice: the test images have no masks)"
    own, proxy = metrics["segmentation/dice"], metrics["segmentation/proxy_dice"]
    return f", Dice of {what} masks {proxy:.2f}, of a U-Net taught by them {own:.2f}"


def example() -> dict[str, Any]:
    """A tiny row for the conformance table: a network of two sizes and random proxies."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 8, 8, 3)).astype(np.float32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    return {
        "objective": mask_objective(UNet(1, (2, 3), norm="instance")),
        "batch": batch,
        "optimizer": optax.adam(1e-3),
        "transform": None,
        "num_examples": 16,
        "artefacts": {PROXIES: rng.random((16, 8, 8)) < 0.4},
    }
