"""A data set: named splits of equal-length arrays, what is known about them, and a checksum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from data.stream import arrays_fingerprint


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Splits of arrays.

    Attributes:
      name: what it is called on the command line.
      splits: ``{"train": {"x": [N, ...], "label": [N], ...}, "test": {...}}``.
      info: facts (``num_classes``, ``num_users``, ground truth of generators, ...).
    """

    name: str
    splits: Mapping[str, Mapping[str, np.ndarray]]
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __getitem__(self, split: str) -> Mapping[str, np.ndarray]:
        if split not in self.splits:
            raise KeyError(f"data set {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    @property
    def fingerprint(self) -> str:
        """Checksum over all splits."""
        flat = {f"{s}/{k}": np.asarray(v) for s, arrays in self.splits.items() for k, v in arrays.items()}
        return arrays_fingerprint(flat)
