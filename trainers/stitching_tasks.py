"""What is stitched: items that several encoders see, and the encoders that are trained on them, if any.

Every task has the same items in one order for all of its models, so that anchors are chosen once, by number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.dataset import Dataset
from data.images import image_dataset
from data.latents import Latents, read_latents, rotated_latents, word_spaces
from data.stream import DataError
from trainers.errors import UserError
from zoo.nn.heads import WithHead
from zoo.nn.mlp import MLP
from zoo.nn.stitching_heads import RelativeHead

Items = Mapping[str, np.ndarray]
StitchingData = Dataset | Latents


def stitching_data(name: str, path: str | None, seed: int) -> StitchingData:
    """What ``--data`` names: generated latents, latents or images of the user's own, or an image set by name.

    Raises:
      DataError: see the readers.
    """
    if path is not None and _holds_latents(Path(path)):
        return read_latents(path)
    if path is None and name in ("rotated", "words"):
        return rotated_latents(seed)[0] if name == "rotated" else word_spaces(seed)
    return image_dataset(name, path)


def _holds_latents(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*.npz"))
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as opened:
            return not {"x", "image"} & set(opened.files)
    except Exception as error:
        raise DataError(f"{path}: not a readable .npz file ({str(error).splitlines()[0]})") from None


@dataclasses.dataclass(frozen=True)
class Task:
    """Items seen by several models.

    Attributes:
      names: of the models.
      widths: of their latents.
      train, test: fields of the items, ``label`` among them.
      num_classes: of the labels.
      fingerprint: of the data.
      inputs: the field that each model reads.
      modules: encoder and head of each model that is trained alone on its field, parameters under ``encoder`` and
        ``head``; none if the fields hold latents as they are.
      looked_at: ``() -> [items, d]``, by what anchors are chosen that must lie apart.
      own_anchors: by model, latents of anchors that are none of the items.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    train: Items
    test: Items
    num_classes: int
    fingerprint: str
    inputs: tuple[str, ...]
    modules: tuple[WithHead, ...]
    looked_at: Callable[[], np.ndarray]
    own_anchors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def items(self) -> int:
        """How many training items there are."""
        return len(self.train["label"])

    @property
    def images(self) -> bool:
        """Whether the items are images, which autoencoders could be trained on."""
        return self.inputs[0] == "x"

    @property
    def test_batch(self) -> dict[str, jax.Array]:
        """All test items."""
        return {k: jnp.asarray(v) for k, v in self.test.items()}

    def encoder(self, i: int) -> Callable[[Any, Mapping], jax.Array]:
        """``(params, batch) -> [B, d]`` of model i."""
        field = self.inputs[i]
        if not self.modules:
            return lambda params, batch: batch[field]
        body = self.modules[i].body
        return lambda params, batch: body.apply({"params": params[f"encoder{i}"]["encoder"]}, batch[field])

    def anchor_batch(self, ids: np.ndarray) -> dict[str, jax.Array]:
        """The anchors as items."""
        rows = ids % self.items  # the user's own anchors are no items; these rows then only give shapes
        return {k: jnp.asarray(v[rows]) for k, v in self.train.items()}


def image_task(data: Dataset, widths: tuple[int, ...], hidden: int, dtype: Any) -> Task:
    """Images, and a multi-layer perceptron for each width.

    Raises:
      UserError: images without labels.
    """
    if "label" not in data["train"] or "label" not in data["test"]:
        raise UserError(f"data {data.name!r} has no labels; heads need them")
    classes = int(data.info["num_classes"])
    train, test = ({"x": data[s]["x"], "label": data[s]["label"].astype(np.int32)} for s in ("train", "test"))
    modules = tuple(WithHead(MLP((hidden,), w, dtype=dtype), RelativeHead(classes)) for w in widths)
    names = tuple(f"encoder {i} ({w})" for i, w in enumerate(widths))
    pixels = lambda: train["x"].reshape(len(train["x"]), -1)  # noqa: E731
    fields = ("x",) * len(widths)
    return Task(names, widths, train, test, classes, data.fingerprint, fields, modules, pixels)


def latent_task(data: Latents) -> Task:
    """Latents of the user's own models, as they are."""
    fields = tuple(f"m{i}" for i in range(len(data.models)))
    arrays = {**dict(zip(fields, data.models.values(), strict=True)), "label": data.labels}
    train, test = ({k: v[rows] for k, v in arrays.items()} for rows in (data.train, ~data.train))
    widths, names = tuple(v.shape[1] for v in data.models.values()), tuple(data.models)
    return Task(names, widths, train, test, data.num_classes, data.fingerprint, fields, (), lambda: train["m0"],
                data.anchors)  # fmt: skip
