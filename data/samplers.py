"""Samplers: which examples make up an epoch, and in what order.

Each returns an ``Order``: epoch -> example ids, a pure function of (seed, epoch) whose epochs all have the same length,
so that a stream's position is enough to resume.  ``shuffled`` and ``sequential`` are in ``data.stream``.
"""

from __future__ import annotations

import numpy as np

from data.stream import DataError, Order, sequential, shuffled

__all__ = ["class_balanced", "cluster_round_robin", "group_wise", "length_bucketed", "sequential", "shuffled"]


def class_balanced(
    labels: np.ndarray, classes_per_batch: int, per_class: int, seed: int = 0, batches: int | None = None
) -> Order:
    """Batches of P classes with K examples each ("P x K"), for losses over pairs and triplets.

    Classes take turns (each batch has P different ones), and so do the examples within a class: none comes again before
    all others of its class came, so only a class with fewer than K examples repeats one within a batch.

    Args:
      labels: ``[N]`` integer classes.
      classes_per_batch: P, at most the number of classes.
      per_class: K.
      seed: of the order.
      batches: per epoch; default as many as N examples make, at least one.

    Raises:
      DataError: fewer than P classes, or P, K or ``batches`` below 1.
    """
    labels = _column(labels, "labels")
    p, k = classes_per_batch, per_class
    size = p * k
    if min(p, k) < 1 or (batches is not None and batches < 1):
        raise DataError(f"classes_per_batch, per_class and batches must be at least 1, got {p}, {k} and {batches}")
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    if p > len(members):
        raise DataError(f"classes_per_batch is {p}, but there are {len(members)} classes")
    count = batches or max(1, len(labels) // size)

    def order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        turns = _turns(rng, len(members), p, count)
        out = np.empty((count, p, k), np.int64)
        for c, own in enumerate(members):
            out[turns == c] = _deal(rng, own, int((turns == c).sum()), k)
        return out.reshape(-1)

    return order


def group_wise(groups: np.ndarray, seed: int = 0, batch_size: int | None = None) -> Order:
    """Examples of one group one after the other, groups and their members in random order.

    Args:
      groups: ``[N]``, the group of each example (a session, a user, a scanner).
      seed: of the order.
      batch_size: if given, every batch holds one group only: a group's last batch is filled up with its own examples
        again, and the batches of all groups are mixed.  If not, every example comes exactly once.

    Raises:
      DataError: no examples, or a batch size below 1.
    """
    groups = _column(groups, "groups")
    if batch_size is not None and batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]

    def order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        if batch_size is None:
            return np.concatenate([rng.permutation(members[g]) for g in rng.permutation(len(members))])
        full = [_deal(rng, own, -(-len(own) // batch_size), batch_size) for own in members]
        return rng.permutation(np.concatenate(full)).reshape(-1)

    return order


def length_bucketed(lengths: np.ndarray, batch_size: int, seed: int = 0, window: int = 50) -> Order:
    """Batches of examples of similar length, in random order; every example exactly once.

    Within windows of ``window`` batches of the shuffled examples, examples are sorted by length: the larger the window,
    the more alike a batch and the less random.  An incomplete batch comes last.

    Args:
      lengths: ``[N]``, the length of each example.
      batch_size: of the stream.
      seed: of the order.
      window: batches per window.

    Raises:
      DataError: no examples, or a batch size or window below 1.
    """
    lengths = _column(lengths, "lengths")
    if batch_size < 1 or window < 1:
        raise DataError(f"batch_size and window must be at least 1, got {batch_size} and {window}")
    whole = len(lengths) // batch_size * batch_size

    def order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        ids = rng.permutation(len(lengths))
        rest, ids = ids[whole:], ids[:whole]
        step = batch_size * window
        parts = [ids[i : i + step] for i in range(0, whole, step)]
        sorted_ = [part[np.argsort(lengths[part], kind="stable")] for part in parts]
        batches = np.concatenate([*sorted_, ids[:0]]).reshape(-1, batch_size)
        return np.concatenate([rng.permutation(batches).reshape(-1), rest])

    return order


def _column(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or not len(values):
        raise DataError(f"{name} must be a column [N] of at least one example, got shape {list(values.shape)}")
    return values


def _deal(rng: np.random.Generator, own: np.ndarray, hands: int, k: int) -> np.ndarray:
    # [hands, k] of one class's examples: all of them once before any again, and none twice in a hand if it can be
    dealt, rest = [], rng.permutation(own)
    for _ in range(hands):
        hand = rest[:k]
        rest = rest[k:]
        while len(hand) < k:
            fresh = rng.permutation(own)
            fresh = fresh[np.argsort(np.isin(fresh, hand), kind="stable")]
            need = k - len(hand)
            hand, rest = np.concatenate([hand, fresh[:need]]), fresh[need:]
        dealt.append(hand)
    return np.array(dealt, np.int64).reshape(hands, k)


def _turns(rng: np.random.Generator, classes: int, p: int, batches: int) -> np.ndarray:
    # [batches, p] classes, p different ones a batch, used equally often up to one
    uses = np.zeros(classes, np.int64)
    out = np.empty((batches, p), np.int64)
    for batch in range(batches):
        # those used least first, ties at random
        out[batch] = np.lexsort((rng.random(classes), uses))[:p]
        uses[out[batch]] += 1
    return out


def cluster_round_robin(
    labels: np.ndarray,
    clusters: np.ndarray,
    count: int,
    classes_per_batch: int,
    per_class: int,
    seed: int = 0,
    batches: int | None = None,
) -> Order:
    """Class-balanced batches ("P x K") of one cluster each, the clusters in turn: batch i is of cluster ``i % count``.

    An epoch has ``count`` times as many batches as the largest cluster fills; smaller ones begin again with a new
    order.  A cluster with fewer than P classes, or with examples of one class missing, repeats what it has; an empty
    one (no examples at all) gives its turns to all examples together.

    Args:
      labels: ``[N]`` integer classes.
      clusters: ``[N]``, the cluster of each example in ``[0, count)``; -1 takes no part.
      count: K clusters.
      classes_per_batch, per_class: P and K of a batch.
      seed: of the order.
      batches: per epoch, if every epoch is to have as many whatever the clusters are.

    Raises:
      DataError: lengths that differ, clusters out of range, no example in any, or P, K or ``batches`` below 1.
    """
    labels, clusters = _column(labels, "labels"), _column(clusters, "clusters")
    if len(labels) != len(clusters):
        raise DataError(f"labels and clusters must be of the same examples, got {len(labels)} and {len(clusters)}")
    p, k = classes_per_batch, per_class
    if min(p, k, count) < 1 or (batches is not None and batches < 1):
        raise DataError(
            f"classes_per_batch, per_class, count and batches must be at least 1, got {p}, {k}, {count} and {batches}"
        )
    if clusters.min() < -1 or clusters.max() >= count or clusters.max() < 0:
        raise DataError(f"clusters must lie in 0..{count - 1}, or be -1, got {clusters.min()}..{clusters.max()}")
    members = [np.flatnonzero(clusters == c) for c in range(count)]
    longest = max(1, max(len(m) for m in members) // (p * k))
    total = batches or count * longest

    def order(epoch: int) -> np.ndarray:
        out = np.empty((total, p * k), np.int64)
        for c, own in enumerate(members):
            own = own if len(own) else np.arange(len(labels))
            turns = -(-(total - c) // count)
            if turns > 0:
                out[c::count] = _balanced(np.random.default_rng([seed, epoch, c]), labels, own, p, k, turns)
        return out.reshape(-1)

    return order


def _balanced(rng: np.random.Generator, labels: np.ndarray, own: np.ndarray, p: int, k: int, batches: int):
    # [batches, p k]; with fewer than p classes they come again within a batch
    groups = [own[labels[own] == c] for c in np.unique(labels[own])]
    each = min(p, len(groups))
    turns = _turns(rng, len(groups), each, batches * -(-p // each)).reshape(batches, -1)[:, :p]
    out = np.empty((batches, p, k), np.int64)
    for g, members in enumerate(groups):
        out[turns == g] = _deal(rng, members, int((turns == g).sum()), k)
    return out.reshape(batches, -1)
