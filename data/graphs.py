"""Graphs of labelled nodes: planted communities, and a reader of an edge list beside a file of features."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from data.stream import DataError, arrays_fingerprint


@dataclasses.dataclass(frozen=True)
class Graph:
    """An undirected graph; each edge is listed in both directions, no node is its own neighbour.

    Attributes:
      x: f32 ``[N, d]``, features of nodes.
      src, dst: i32 ``[E]``.
      mask: bool ``[E]``, real edges (all, unless padded).
      label: i32 ``[N]``.
      train: bool ``[N]``, nodes to train on.
    """

    x: np.ndarray
    src: np.ndarray
    dst: np.ndarray
    mask: np.ndarray
    label: np.ndarray
    train: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Checksum of everything."""
        return arrays_fingerprint(dataclasses.asdict(self))

    def arrays(self) -> dict[str, np.ndarray]:
        """What an encoder reads: ``x``, ``src``, ``dst``, ``mask``."""
        return {k: getattr(self, k) for k in ("x", "src", "dst", "mask")}


def planted_communities(
    seed: int = 0,
    nodes: int = 240,
    classes: int = 4,
    features: int = 16,
    degree: float = 6.0,
    within: float = 0.85,
    signal: float = 0.6,
    test_share: float = 0.3,
) -> Graph:
    """A stochastic block model whose blocks are the classes; features point weakly towards the class.

    Args:
      seed: of everything.
      nodes, classes, features: sizes.
      degree: mean number of neighbours drawn for a node.
      within: share of them in its own class.
      signal: length of a class's mean feature; the noise has deviation 1 in all directions together.
      test_share: share of nodes held out.

    Raises:
      DataError: sizes that make no graph.
    """
    if min(nodes, classes, features) < 1 or nodes < 2 * classes or not 0 <= within <= 1 or not 0 < degree < nodes:
        raise DataError(
            f"need two nodes a class, within in [0, 1] and a degree in (0, {nodes}); got {nodes} nodes, {classes} "
            f"classes, {features} features, {degree}, {within}"
        )
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(nodes) % classes).astype(np.int32)
    means = rng.standard_normal((classes, features))
    means *= signal / np.linalg.norm(means, axis=1, keepdims=True)
    x = means[label] + rng.standard_normal((nodes, features)) / np.sqrt(features)
    same = label[:, None] == label[None, :]
    # each unordered pair once, with probabilities that give the degrees
    inside, outside = same.sum(1).mean() - 1, (~same).sum(1).mean()
    chance = np.where(same, degree * within / max(inside, 1), degree * (1 - within) / max(outside, 1))
    pairs = np.argwhere(np.triu(rng.random((nodes, nodes)) < chance, 1))
    held = rng.permutation(nodes)[: max(1, round(nodes * test_share))]
    return _graph(x, pairs, label, ~np.isin(np.arange(nodes), held))


def read_graph(path: str | Path, test_share: float = 0.1) -> Graph:
    """A folder with ``edges.csv`` (or ``.tsv``, ``.txt``: two node numbers a line) and ``nodes.npz``.

    ``nodes.npz`` holds ``features`` [N, d], ``labels`` [N] and perhaps ``train``, bool [N].  Edges count in both
    directions; repeated ones and loops are dropped.

    Raises:
      DataError: what is missing or malformed, with the file and the line.
    """
    folder = Path(path)
    files = [folder / f"edges.{s}" for s in ("csv", "tsv", "txt") if (folder / f"edges.{s}").is_file()]
    if not files or not (folder / "nodes.npz").is_file():
        raise DataError(f"{folder}: expected edges.csv (or .tsv, .txt) and nodes.npz with features and labels")
    try:
        with np.load(folder / "nodes.npz", allow_pickle=False) as opened:
            held = {k: opened[k] for k in opened.files}
    except Exception as error:
        raise DataError(f"{folder / 'nodes.npz'}: not a readable .npz file ({str(error).splitlines()[0]})") from None
    missing = [k for k in ("features", "labels") if k not in held]
    if missing:
        raise DataError(f"{folder / 'nodes.npz'}: has no {' or '.join(missing)}; it has {', '.join(held) or 'nothing'}")
    x, label = held["features"], held["labels"]
    if x.ndim != 2 or label.shape != (len(x),) or not np.issubdtype(label.dtype, np.integer):
        raise DataError(
            f"{folder / 'nodes.npz'}: expected features [N, d] and integer labels [N], got {x.shape} and {label.shape}"
        )
    if label.min(initial=0) < 0:
        node = int(label.argmin())
        raise DataError(f"{folder / 'nodes.npz'}: label of node {node} is {label[node]}; classes count from 0")
    if not np.isfinite(x).all():
        row = int((~np.isfinite(x).all(1)).argmax())
        raise DataError(f"{folder / 'nodes.npz'}: features of node {row} are not finite")
    pairs = []
    for number, line in enumerate(files[0].read_text().splitlines(), start=1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 2 or not all(w.isdigit() and int(w) < len(x) for w in words[:2]):
            raise DataError(f"{files[0]}: line {number}: expected two node numbers in [0, {len(x)}), got {line!r}")
        pairs.append((int(words[0]), int(words[1])))
    if not pairs:
        raise DataError(f"{files[0]}: holds no edges")
    train = held.get("train")
    if train is None:
        out = np.random.default_rng(0).permutation(len(x))[: max(1, round(len(x) * test_share))]
        train = ~np.isin(np.arange(len(x)), out)
    if train.shape != (len(x),) or train.dtype != bool or not 0 < train.sum() < len(x):
        raise DataError(
            f"{folder / 'nodes.npz'}: train must be bool [{len(x)}] with some of each, got {train.dtype} {train.shape}"
        )
    return _graph(x, np.array(pairs), label, train)


def _graph(x: np.ndarray, pairs: np.ndarray, label: np.ndarray, train: np.ndarray) -> Graph:
    pairs = np.sort(pairs, 1)
    pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0).astype(np.int32)
    src, dst = np.concatenate([pairs, pairs[:, ::-1]]).T
    return Graph(x.astype(np.float32), src, dst, np.ones(len(src), bool), label.astype(np.int32), train)
