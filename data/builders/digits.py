"""Scikit-learn's handwritten digits (bundled: nothing is downloaded) as a TFDS set ``digits``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 images: ``image`` uint8 ``[8, 8, 1]`` (0 to 255), ``label`` 0 to 9; every fifth is in ``test``."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Scikit-learn's handwritten digits, 8 x 8 pixels.",
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
            citation="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, held_out: bool):
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
        for i, (image, label) in enumerate(zip(images, bunch.target, strict=True)):
            if (i % 5 == 4) == held_out:
                yield i, {"image": image, "label": int(label)}


def prepare_digits(data_dir: str | os.PathLike | None = None) -> Any:
    """The prepared builder."""
    from data.tfds import prepare

    builder = Digits(data_dir=data_dir, file_format="array_record")
    prepare(builder)
    return builder
