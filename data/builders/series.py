"""A problem of the UCR/UEA archive (``.ts`` files of your own) as a TFDS set ``time_series/NAME``."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data.timeseries import load_ucr


@dataclasses.dataclass
class SeriesConfig(tfds.core.BuilderConfig):
    """Which problem, and the folder that holds ``NAME_TRAIN.ts`` and ``NAME_TEST.ts``."""

    path: str = ""


class TimeSeries(tfds.core.GeneratorBasedBuilder):
    """``x`` f32 ``[T, C]`` as the files have it (not normalised), ``label``; the archive's own two splits."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = []

    def _problem(self) -> Any:
        return load_ucr(self.builder_config.path, self.builder_config.name, normalise="none")

    def _info(self) -> Any:
        problem = self._problem()
        features = {
            "x": tfds.features.Tensor(shape=problem["train"]["x"].shape[1:], dtype=np.float32),
            "label": tfds.features.ClassLabel(names=list(problem.info["classes"])),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{problem.name}, a time-series classification problem of the UCR/UEA archive.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("x", "label"),
            homepage="https://www.timeseriesclassification.com",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        problem = self._problem()
        return {split: self._generate_examples(problem[split]) for split in ("train", "test")}

    def _generate_examples(self, arrays: Any):
        for i in range(len(arrays["x"])):
            yield i, {"x": arrays["x"][i], "label": int(arrays["label"][i])}


def prepare_series(path: str | os.PathLike, name: str, data_dir: str | os.PathLike | None = None) -> Any:
    """The prepared builder of problem ``name`` in the folder ``path``.

    Raises:
      DataError: missing or malformed files.
    """
    from data.tfds import prepare, quiet

    config = SeriesConfig(name=name, path=os.fspath(path))
    with quiet():
        builder = TimeSeries(config=config, data_dir=data_dir, file_format="array_record")
    prepare(builder)
    return builder
