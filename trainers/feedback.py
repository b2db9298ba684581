"""What recipes of relevance feedback share: vectors of texts, and figures for every amount of feedback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from trainers.recipe import UserError
from trainers.retrieval import SPECIAL_IDS, ranking_figures, search
from zoo.retrieval import lol


def check_positives(query_ids: Sequence[str], positives: np.ndarray) -> None:
    """Refuses queries without a labelled positive.

    Raises:
      UserError: names the first.
    """
    without = np.flatnonzero(~(positives >= 0).any(1))
    if len(without):
        raise UserError(
            f"qid {query_ids[without[0]]}: no positive passage in the training sub-corpus ({len(without)} such queries)"
        )


def latent_vectors(ids: np.ndarray, words: np.ndarray, idf: np.ndarray) -> np.ndarray:
    """Unit vectors f32 ``[N, d]`` of texts: sums of their words' vectors, by inverse document frequency."""
    total = np.stack([idf[row] @ words[row] for row in ids])
    return (total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def bag_of_words(ids: np.ndarray, size: int) -> np.ndarray:
    """Counts of words, f32 ``[N, size]``, special tokens left out."""
    counts = np.zeros((len(ids), size), np.float32)
    np.add.at(counts, (np.arange(len(ids))[:, None], ids), 1)
    counts[:, :SPECIAL_IDS] = 0
    return counts


def bm25_weights(ids: np.ndarray, size: int, k1: float = 0.9, b: float = 0.4) -> np.ndarray:
    """BM25's weight of every token in every document, f32 ``[N, size]``; its product with a query's counts is BM25."""
    counts = bag_of_words(ids, size)
    lengths, frequency = counts.sum(1, keepdims=True), (counts > 0).sum(0)
    idf = np.log1p((len(ids) - frequency + 0.5) / (frequency + 0.5))
    norm = k1 * (1 - b + b * lengths / max(float(lengths.mean()), 1e-9))
    return (idf * counts * (k1 + 1) / (counts + norm)).astype(np.float32)


def measurement(
    reviser: lol.Reviser,
    test: Mapping[str, np.ndarray],
    passages: np.ndarray,
    index: np.ndarray,
    grades: np.ndarray | None = None,
) -> Callable[..., dict[str, float]]:
    """``(params) -> figures`` of every amount of feedback: losses, MRR@10, and how often more feedback is worse."""
    k_max = test["feedback"].shape[1]
    rows, documents = jnp.asarray(passages), jnp.asarray(index)
    batch = min(64, len(test["query"]))

    @jax.jit
    def some(params, query, feedback, positives):
        own = jnp.minimum(jnp.arange(k_max + 1)[None], jnp.sum(feedback >= 0, 1)[:, None])
        vectors, _ = reviser.revise(params, query, jnp.take(rows, jnp.maximum(feedback, 0), axis=0), own, None)
        b, r, v = vectors.shape
        flat = jnp.repeat(positives, r, axis=0)
        return vectors, lol.reformulation_loss(vectors.reshape(b * r, v), documents, flat)[0].reshape(b, r)

    def measure(params) -> dict[str, float]:
        losses, ids, n = [], [], len(test["query"])
        for start in range(0, n, batch):
            at = max(0, min(start, n - batch))  # the last batch overlaps the one before instead of being padded
            part = [jnp.asarray(test[f][at : at + batch]) for f in ("query", "feedback", "positives")]
            vectors, found = (np.asarray(x)[start - at :] for x in some(params, *part))
            losses.append(found)
            flat = search(vectors.reshape(-1, vectors.shape[-1]), index, 100)
            ids.append(flat.reshape(len(found), k_max + 1, -1))
        losses, ids = np.concatenate(losses), np.concatenate(ids)
        figures = {k: float(v) for k, v in lol.feedback_figures(jnp.asarray(losses)).items()}
        for k in range(k_max + 1):
            figures[f"loss_at_{k}"] = float(losses[:, k].mean())
            own = ranking_figures(ids[:, k], test["positives"], grades)
            figures |= {f"{name}_with_{k}": v for name, v in own.items() if name != "map_at_100"}
            if k:
                figures[f"worse_{k}"] = float((losses[:, k] > losses[:, k - 1]).mean())
        return figures

    return measure
