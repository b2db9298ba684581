"""Open-set evaluation: identities that no model was trained on, as queries and a gallery."""

from __future__ import annotations

import numpy as np

from data.dataset import Dataset
from data.images import digits
from data.stream import DataError


def open_set(data: Dataset, held_out: int, turned: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """Identities that no model trains on: queries from the training split, galleries from the test split.

    Args:
      data: images ``x`` of classes ``label`` in 0 .. C-1, with splits ``train`` and ``test``.
      held_out: the last classes, as they are: identities 0 .. held_out - 1.
      turned: add a copy of every class by a quarter turn, each an identity of its own, after those.

    Returns:
      Queries and gallery, each with ``x`` and ``label`` (the identity), and the number of identities.

    Raises:
      DataError: fewer than two identities, one without query or gallery images, or images that cannot be turned.
    """
    classes = int(data.info.get("num_classes", int(data["train"]["label"].max()) + 1))
    identities = held_out + (classes if turned else 0)
    if identities < 2:
        raise DataError(
            f"{held_out} held-out classes without turned copies are {identities} identities; at least 2 are needed"
        )
    found = []
    for split, role in (("train", "query"), ("test", "gallery")):
        x, label = np.asarray(data[split]["x"]), np.asarray(data[split]["label"])
        if turned and (x.ndim != 4 or x.shape[1] != x.shape[2]):
            raise DataError(f"only square images [N, S, S, C] can be turned; {data.name!r} has {list(x.shape)}")
        own = label >= classes - held_out
        parts = [(x[own], label[own] - (classes - held_out))]
        if turned:
            parts.append((np.rot90(x, axes=(1, 2)), label + held_out))
        arrays = {"x": np.concatenate([p[0] for p in parts]), "label": np.concatenate([p[1] for p in parts])}
        for identity in range(identities):
            if not (arrays["label"] == identity).any():
                raise DataError(f"identity {identity} of {data.name!r} has no {role} image in the {split} split")
        found.append(arrays)
    return found[0], found[1], identities


def shuffled_digits(seed: int) -> Dataset:
    """The bundled digits with their classes in another order and another split of the same sizes for every seed."""
    rng = np.random.default_rng([seed, 5])
    whole = digits()
    parts = {k: np.concatenate([whole["train"][k], whole["test"][k]]) for k in ("x", "label")}
    parts["label"] = rng.permutation(10).astype(np.int32)[parts["label"]]
    held, kept = np.split(rng.permutation(len(parts["x"])), [len(whole["test"]["x"])])
    splits = {name: {k: v[ids] for k, v in parts.items()} for name, ids in (("train", kept), ("test", held))}
    return Dataset("digits", splits, whole.info)
