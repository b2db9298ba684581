"""TFDS without TensorFlow: any of its sets by name, prepared as array_record and read by position.

    arrays = load_tfds("mnist", "train")                       # {"image": uint8 [60000, 28, 28, 1], "label": ...}
    source = data_source("mnist", "train[:10%]")               # decoded one by one, for data.pipelines.GrainStream

TFDS itself asks for TensorFlow in two places of a preparation: to encode images as PNG or JPEG, and (in many builders)
to open a file.  Both are lent to it here, by Pillow and Python, for the time of the preparation and only where
TensorFlow is not installed.  A builder that asks for more is named in a DataError with what to do.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import importlib.resources
import importlib.resources.abc
import importlib.util
import io
import logging
import os
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from data.stream import DataError


def load_tfds(name: str, split: str, data_dir: str | os.PathLike | None = None) -> dict[str, np.ndarray]:
    """A split of a TFDS set, whole, in memory; prepared (and downloaded) first if it is not there yet.

    Args:
      name: ``"mnist"``, ``"cifar10:3.*.*"``, ``"emnist/letters"``, or one of our own (:mod:`data.builders`).
      split: ``"train"``, ``"test[:20%]"``, ...
      data_dir: where prepared data lie; default: TFDS's own (``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``).

    Returns:
      Fields, stacked; nested ones are named ``outer/inner``.  Texts are arrays of bytes objects.

    Raises:
      DataError: an unknown name or split (the nearest are offered), no network, a builder that needs TensorFlow,
        a field whose examples differ in shape.
    """
    source = data_source(name, split, data_dir)
    with quiet():
        columns: dict[str, list] = {}
        for i in range(len(source)):
            for field, value in _flatten(source[i]).items():
                columns.setdefault(field, []).append(value)
    if not columns:
        raise DataError(f"{name}: split {split!r} holds no examples")
    return {field: _stack(values, name, field) for field, values in columns.items()}


def data_source(name: str, split: str, data_dir: str | os.PathLike | None = None) -> Any:
    """The same split as a random-access source: ``len(source)``, ``source[i]`` a dict.  Raises as :func:`load_tfds`."""
    builder = prepared(name, data_dir)
    splits = list(builder.info.splits)
    base = split.split("[")[0].split("+")[0].strip()
    if base not in (*splits, "all"):
        raise DataError(f"{name} has no split {base!r}; {_nearest(base, splits)}")
    try:
        return builder.as_data_source(split=split)
    except Exception as error:
        raise DataError(f"{name}: cannot read split {split!r} from {builder.data_dir}: {_line(error)}") from error


def prepared(name: str, data_dir: str | os.PathLike | None = None) -> Any:
    """The TFDS builder of a set whose array_record files are on disk; prepares them if need be.

    Raises:
      DataError: as :func:`load_tfds`.
    """
    tfds = _tfds()
    found = _read_only(tfds, name, data_dir)
    if found is not None:
        return found
    try:
        with quiet():
            builder = tfds.builder(name, file_format="array_record", data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        raise DataError(f"unknown TFDS set {name!r}; {_nearest(name, _names(tfds))}") from None
    except Exception as error:
        raise DataError(f"TFDS set {name!r} cannot be made: {_line(error)}") from error
    prepare(builder)
    return builder


def prepare(builder: Any) -> None:
    """Downloads (where it must) and writes a builder's array_record files, without TensorFlow.

    Raises:
      DataError: no network, no room, or a builder that needs TensorFlow; the message says where prepared data go.
    """
    try:
        with quiet(), _without_tensorflow(builder):
            builder.download_and_prepare()
    except Exception as error:
        needs_it = [e for e in _causes(error) if isinstance(e, ModuleNotFoundError) and e.name == "tensorflow"]
        name = builder.info.full_name
        if needs_it:
            command = f"tfds build {builder.name} --file_format=array_record --data_dir=DIR"
            raise DataError(
                f"preparing {name} needs TensorFlow, once: where it is installed run '{command}' "
                f"and put the result at {builder.data_dir}"
            ) from error
        if isinstance(error, DataError):
            raise
        hosts = [urlsplit(e.request.url).netloc for e in _causes(error) if getattr(e, "request", None) is not None]
        reason = f"{hosts[0]} cannot be reached" if hosts else _line(error)
        raise DataError(
            f"cannot prepare {name}: {reason}; without a network, put array_record data prepared elsewhere "
            f"at {builder.data_dir}"
        ) from error


# finding


def _tfds() -> Any:
    import tensorflow_datasets

    import data.builders  # noqa: F401 - registers ours under their names

    return tensorflow_datasets


def _read_only(tfds: Any, name: str, data_dir: str | os.PathLike | None) -> Any:
    # data on disk are used as they are, whether or not the code that prepared them is known
    name, _, version = name.partition(":")
    root = Path(data_dir if data_dir is not None else tfds.core.constants.DATA_DIR).expanduser() / name
    pattern = version or "*"
    folders = [p.parent for p in root.glob(f"{pattern}/dataset_info.json")]
    if not folders:
        return None
    newest = max(folders, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")])
    try:
        builder = tfds.builder_from_directory(newest)
    except Exception as error:
        raise DataError(f"{newest}: not readable as a TFDS set: {_line(error)}") from error
    kind = builder.info.file_format.value
    if kind != "array_record":
        raise DataError(
            f"{newest} holds {kind} files, which need TensorFlow; prepare it with file_format='array_record'"
        )
    return builder


def _names(tfds: Any) -> list[str]:
    return tfds.list_builders(with_community_datasets=False)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {len(names)}: {', '.join(names[:8])}"


# reading


def _flatten(example: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in example.items():
        nested = isinstance(value, Mapping)
        flat.update(_flatten(value, f"{prefix}{key}/") if nested else {f"{prefix}{key}": value})
    return flat


def _stack(values: list, name: str, field: str) -> np.ndarray:
    if isinstance(values[0], (bytes, str)):
        return np.array(values, dtype=object)
    shapes = {np.shape(v) for v in values}
    if len(shapes) > 1:
        few = " and ".join(map(str, sorted(shapes)[:2]))
        raise DataError(
            f"{name}: examples of field {field!r} differ in shape, such as {few}; use data_source and pad them"
        )
    return np.stack([np.asarray(v) for v in values])


# preparing


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TFDS prints to standard output, which belongs to the command, and warns of what is meant; not within this.

    Its downloader also logs every try that fails, where one error says it all.
    """
    from absl import logging as absl_logging

    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    # stays: its threads go on trying after the first error has ended the preparation
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    sys.modules["tensorflow_datasets"].disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        absl_logging.set_verbosity(before)


@contextlib.contextmanager
def _without_tensorflow(builder: Any) -> Iterator[None]:
    if "importlib_resources" not in sys.modules and importlib.util.find_spec("importlib_resources") is None:
        # TFDS asks for the backport by name; this Python has the original
        sys.modules["importlib_resources"] = importlib.resources
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.core.utils import lazy_imports_utils

    encoder = image_feature._ImageEncoder
    encode = encoder._encode_image
    modules = {sys.modules[cls.__module__] for cls in type(builder).__mro__ if cls.__module__ in sys.modules}
    lent = [m for m in modules if getattr(m, "tf", None) is lazy_imports_utils.tensorflow]
    # the float32 encoder calls this one with four uint8 channels
    encoder._encode_image = lambda self, image: encode_image(image, self.encoding_format or "png")
    for module in lent:
        module.tf = _FILES
    try:
        yield
    finally:
        encoder._encode_image = encode
        for module in lent:
            module.tf = lazy_imports_utils.tensorflow


def encode_image(image: np.ndarray, kind: str) -> bytes:
    """A uint8 (or, with one channel, uint16) image ``[h, w, c]`` as ``"png"`` or ``"jpeg"`` bytes, by Pillow."""
    from PIL import Image

    if image.ndim != 3 or image.shape[-1] not in (1, 2, 3, 4):
        raise DataError(f"an image needs shape [height, width, 1 to 4 channels], got {list(image.shape)}")
    plain = np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image)
    buffer = io.BytesIO()
    options = {"quality": 95} if kind == "jpeg" else {}
    Image.fromarray(plain).save(buffer, format=kind, **options)
    return buffer.getvalue()


class _Files:
    """As much of ``tf`` as opens files; anything else is the missing module."""

    def __getattr__(self, name: str) -> Any:
        raise ModuleNotFoundError(f"No module named 'tensorflow' (for {name})", name="tensorflow")


_FILES = _Files()
_FILES.io = types.SimpleNamespace(
    gfile=types.SimpleNamespace(
        GFile=lambda path, mode="r": open(path, mode),  # noqa: SIM115 - the builder closes it
        exists=os.path.exists,
        isdir=os.path.isdir,
        listdir=os.listdir,
        glob=glob.glob,
    )
)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException, most: int = 200) -> str:
    text = " ".join((str(error) or type(error).__name__).split())
    return text if len(text) <= most else text[:most] + " ..."
