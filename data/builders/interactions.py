"""User-item interactions (CSV/TSV or LightGCN's lines, of your own) as a TFDS set ``interactions/NAME``."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data.interactions import load_interactions


@dataclasses.dataclass
class InteractionsConfig(tfds.core.BuilderConfig):
    """The source, how it is split (see ``data.interactions.load_interactions``), and the seed of a random split."""

    path: str = ""
    how: str = "random"
    seed: int = 0


class Interactions(tfds.core.GeneratorBasedBuilder):
    """``train``: ``user``, ``item``; ``test`` (and ``validation``): one row per user, lists padded with -1."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = []

    def _dataset(self) -> Any:
        config = self.builder_config
        return load_interactions(config.path, config.how, config.seed)

    def _info(self) -> Any:
        dataset = self._dataset()
        # TFDS has one set of features for all splits: those of a row, with empty lists where a split has none
        fields = {field: arrays[field] for arrays in dataset.splits.values() for field in arrays}
        widths = {
            f: max(a[f].shape[1] for a in dataset.splits.values() if f in a) for f in fields if fields[f].ndim == 2
        }
        features = {f: tfds.features.Tensor(shape=(widths[f],) if f in widths else (), dtype=np.int32) for f in fields}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"User-item interactions of {dataset.name}.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(
                {"num_users": int(dataset.info["num_users"]), "num_items": int(dataset.info["num_items"])}
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        dataset = self._dataset()
        return {split: self._generate_examples(arrays) for split, arrays in dataset.splits.items()}

    def _generate_examples(self, arrays: Any):
        shapes = {name: feature.shape for name, feature in self.info.features.items()}
        for i in range(len(next(iter(arrays.values())))):
            row = {}
            for name, shape in shapes.items():
                row[name] = np.full(shape, -1, np.int32)
                if name in arrays and shape:
                    row[name][: arrays[name].shape[1]] = arrays[name][i]
                elif name in arrays:
                    row[name] = np.int32(arrays[name][i])
            yield i, row


def prepare_interactions(
    path: str | os.PathLike, name: str, data_dir: str | os.PathLike | None = None, how: str = "random", seed: int = 0
) -> Any:
    """The prepared builder of the interactions in ``path``, under ``name``.

    Raises:
      DataError: unreadable or malformed data.
    """
    from data.tfds import prepare, quiet

    config = InteractionsConfig(name=name, path=os.fspath(path), how=how, seed=seed)
    with quiet():
        builder = Interactions(config=config, data_dir=data_dir, file_format="array_record")
    prepare(builder)
    return builder
