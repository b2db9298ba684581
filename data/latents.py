"""Latents of several encoders over the same items: generators with known truth, and a reader of your own.

In every set row i of each model is the same item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.lsa import latent_semantic_words
from data.stream import DataError, arrays_fingerprint


@dataclasses.dataclass(frozen=True)
class Latents:
    """Several encoders' latents of the same items.

    Attributes:
      models: by name, f32 ``[N, d]``; widths may differ.
      labels: i32 ``[N]``, classes from 0.
      anchors: by name, f32 ``[k, d]``, latents of anchors that are none of the items; empty if anchors are to be chosen
        among the items.
      train: bool ``[N]``, items to train on.
      source: for messages.
    """

    models: Mapping[str, np.ndarray]
    labels: np.ndarray
    anchors: Mapping[str, np.ndarray]
    train: np.ndarray
    source: str = "latents"

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    @property
    def fingerprint(self) -> str:
        """Checksum of everything."""
        named = {f"model/{k}": v for k, v in self.models.items()} | {f"anchors/{k}": v for k, v in self.anchors.items()}
        return arrays_fingerprint({**named, "labels": self.labels, "train": self.train})


def rotated_latents(
    seed: int = 0,
    samples: int = 600,
    dimension: int = 12,
    widths: tuple[int, ...] = (12, 12, 20),
    classes: int = 5,
    noise: float = 0.0,
    test_share: float = 0.3,
) -> tuple[Latents, Dataset]:
    """Rotated, rescaled and noisy copies of one latent space: an ideal case whose truth is known.

    Items are a Gaussian around the mean of their class, of norm about 3 apart.  Model m holds ``s_m Z Q_m + noise``,
    with ``Q_m`` [dimension, width] of orthonormal rows and ``s_m`` in [0.2, 5].

    Returns:
      The latents, and the truth: split ``items`` with ``z`` and ``label``, and ``maps``, ``scales`` in ``info``.

    Raises:
      DataError: sizes that cannot be generated.
    """
    if min(samples, dimension, classes, *widths) < 1 or min(widths) < dimension or noise < 0 or not 0 < test_share < 1:
        raise DataError(
            f"need samples, classes above 0, widths of at least the dimension {dimension}, noise of 0 or more and a "
            f"test_share in (0, 1); got {samples}, {classes}, {widths}, {noise}, {test_share}"
        )
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(samples) % classes).astype(np.int32)
    means = 3 * rng.standard_normal((classes, dimension)) / np.sqrt(dimension)
    z = means[label] + rng.standard_normal((samples, dimension)) / np.sqrt(dimension)
    maps, scales, models = [], [], {}
    for number, width in enumerate(widths):
        maps.append(np.linalg.qr(rng.standard_normal((width, width)))[0][:dimension])
        scales.append(float(np.exp(rng.uniform(np.log(0.2), np.log(5)))))
        moved = scales[-1] * (z @ maps[-1] + noise * rng.standard_normal((samples, width)) / np.sqrt(width))
        models[f"model{number}"] = moved.astype(np.float32)
    truth = Dataset("rotated", {"items": {"z": z.astype(np.float32), "label": label}}, {"maps": maps, "scales": scales})
    return Latents(models, label, {}, _train_rows(samples, test_share, seed), "rotated"), truth


def word_spaces(
    seed: int = 0,
    words: int = 300,
    topics: int = 8,
    documents: int = 4000,
    length: int = 40,
    features: int = 8,
    test_share: float = 0.3,
) -> Latents:
    """Word vectors learnt twice: latent semantic analysis of two halves of a generated corpus, over one vocabulary.

    A word belongs to every topic by a share of its own (Dirichlet, mostly one or two topics); its label is the topic of
    its largest share.  A document has one topic and draws words by their shares of it and by rank, so that items are
    words by falling expected frequency and ``top_m`` anchors are the common ones.

    Raises:
      DataError: sizes that cannot be generated.
    """
    if topics < 2 or words < topics or min(documents, length, features) < 1 or documents < 2 * features:
        raise DataError(
            "need two topics, as many words as topics, positive sizes and documents for both halves; got "
            f"{topics}, {words}, {documents}, {length}, {features}"
        )
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(topics, 0.3), words)
    label = share.argmax(1).astype(np.int32)
    law = (share / np.sqrt(1 + np.arange(words))[:, None]).T
    law = np.cumsum(law / law.sum(1, keepdims=True), 1)
    owner = rng.integers(topics, size=documents)
    ids = np.stack([np.searchsorted(law[t], rng.random(length)) for t in owner]).clip(0, words - 1)
    models = {}
    for name, half in (("first", ids[::2]), ("second", ids[1::2])):
        vectors, _ = latent_semantic_words(half, words, features, seed, ignored=0)
        # a word that a half never uses has no direction
        vectors = np.where(np.abs(vectors).max(1, keepdims=True) > 0, vectors, 1e-3 * rng.standard_normal(features))
        models[name] = vectors.astype(np.float32)
    return Latents(models, label, {}, _train_rows(words, test_share, seed), "words")


def read_latents(path: str | Path, test_share: float = 0.3) -> Latents:
    """Latents on disk.

    Args:
      path: an ``.npz`` file with one array ``[N, d]`` per model under its name (or ``NAME/encoding`` with
        ``NAME/anchors_latents`` [k, d]) and ``labels`` [N]; or a folder with one ``.npz`` per model, named after it,
        each with ``encoding``, perhaps ``anchors_latents`` and, in one of them, ``labels``.  ``train``, bool [N], says
        which items to train on.
      test_share: share of items held out where there is no ``train`` (a fixed choice).

    Raises:
      DataError: no such file, missing or malformed arrays, models that disagree about the items or the anchors.
    """
    where = Path(path)
    if where.is_dir():
        files = sorted(where.glob("*.npz"))
        if not files:
            raise DataError(f"{where}: holds no .npz files; expected one per model, with 'encoding' [N, d]")
        arrays = {}
        for file in files:
            for key, value in _npz(file).items():
                shared = key in ("label", "labels", "train")
                arrays[key if shared else f"{file.stem}/{key}"] = value
    elif where.is_file():
        arrays = _npz(where)
    else:
        raise DataError(f"{where}: no such file or folder; give an .npz file of latents or a folder of them")
    labels = arrays.pop("labels", arrays.pop("label", None))
    train = arrays.pop("train", None)
    models, anchors = {}, {}
    for key, value in arrays.items():
        name, _, kind = key.rpartition("/")
        if kind == "anchors_latents":
            anchors[name] = value
        elif kind == "encoding" or not name:
            models[name or key] = value
        else:
            raise DataError(f"{where}: {key!r} is neither NAME, NAME/encoding nor NAME/anchors_latents")
    return _checked(where, models, labels, anchors, train, test_share)


def _checked(where, models, labels, anchors, train, test_share) -> Latents:
    if len(models) < 2:
        raise DataError(
            f"{where}: needs the latents of two models or more to stitch, got {', '.join(models) or 'none'}"
        )
    sizes = {k: v.shape for k, v in models.items()}
    if any(len(s) != 2 for s in sizes.values()) or len({s[0] for s in sizes.values()}) != 1:
        raise DataError(f"{where}: every model needs latents [N, d] of the same N items, got {sizes}")
    n = next(iter(sizes.values()))[0]
    for name, value in {**models, **{f"{k}/anchors_latents": v for k, v in anchors.items()}}.items():
        if not np.issubdtype(value.dtype, np.floating):
            raise DataError(f"{where}: {name}: expected floats, got {value.dtype}")
        bad = ~np.isfinite(value).all(1) if value.ndim == 2 else np.zeros(1, bool)
        if bad.any():
            raise DataError(f"{where}: {name}: row {int(bad.argmax())} is not finite")
    if labels is None or labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        found = "none" if labels is None else f"{labels.dtype} {labels.shape}"
        raise DataError(f"{where}: labels must hold one class number (0, 1, ...) per item ([{n}]), got {found}")
    if anchors and (set(anchors) != set(models) or len({len(a) for a in anchors.values()}) != 1):
        counts = {k: anchors[k].shape for k in anchors}
        raise DataError(f"{where}: every model needs latents of the same anchors, in one order; got {counts}")
    for name, own in anchors.items():
        if own.ndim != 2 or own.shape[1] != sizes[name][1]:
            raise DataError(
                f"{where}: {name}: latent dim {sizes[name][1]} vs anchors {own.shape[-1]}: anchors must come from the "
                "same encoder"
            )
    if train is None:
        train = _train_rows(n, test_share, 0)
    if train.shape != (n,) or train.dtype != bool or not 0 < train.sum() < n:
        raise DataError(
            f"{where}: train must hold one bool per item ([{n}]), some of each; got {train.dtype} {train.shape}"
        )
    floats = lambda rows: {k: np.asarray(v, np.float32) for k, v in rows.items()}  # noqa: E731
    return Latents(floats(models), labels.astype(np.int32), floats(anchors), train, str(where))


def _npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as opened:
            return {k: opened[k] for k in opened.files}
    except Exception as error:
        raise DataError(f"{file}: not a readable .npz file of plain arrays ({str(error).splitlines()[0]})") from None


def _train_rows(n: int, test_share: float, seed: int) -> np.ndarray:
    held = max(1, round(n * test_share))
    return ~np.isin(np.arange(n), np.random.default_rng([seed, 7]).permutation(n)[:held])
