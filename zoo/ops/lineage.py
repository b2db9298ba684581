"""Lineage: which models' features may be compared, as a small record that is checkpointed beside the weights.

Features of two models can be compared if both models refer to the same *frame* (the fixed classifier's prototypes, the
anchors, the axes their features are measured along), or if one was trained to stay aligned with the other.  A record
says what a model's frame is, which model it is, and which models came before it; all are checksums of arrays
(:func:`zoo.ops.fingerprint.fingerprint`), so that it can live in ``constants`` and be compared exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from zoo.ops.fingerprint import fingerprint

ANCESTORS = 64
"""Ancestors a record remembers, the nearest first; those further back are forgotten."""


def lineage(
    frame: PyTree, weights: PyTree, parent: Mapping[str, Any] | None = None, aligned: bool = True
) -> dict[str, jax.Array]:
    """The record of a model.

    Args:
      frame: the arrays its features are measured against (prototypes, anchors).
      weights: its parameters; they make up its id.
      parent: the record of the model it was trained from or aligned to; ``None`` for a first model.
      aligned: whether its training kept its features comparable with the parent's.

    Returns:
      ``frame`` and ``id``, uint32 ``[2]``; ``parents``, uint32 ``[64, 2]``, the ids of its ancestors, the nearest
      first, zeros after the last; ``aligned``, bool ``[64]``, with which of them its features stay comparable.
    """
    record = {
        "frame": fingerprint(frame),
        "id": fingerprint(weights),
        "parents": jnp.zeros((ANCESTORS, 2), jnp.uint32),
        "aligned": jnp.zeros((ANCESTORS,), bool),
    }
    if parent is None:
        return record
    ids = jnp.concatenate([jnp.asarray(parent["id"])[None], jnp.asarray(parent["parents"])])
    # comparable with what the parent is comparable with, as long as every link of the chain was aligned
    kept = jnp.concatenate([jnp.ones(1, bool), jnp.asarray(parent["aligned"])]) & aligned
    return {**record, "parents": ids[:ANCESTORS].astype(jnp.uint32), "aligned": kept[:ANCESTORS]}


def comparable(query: Mapping[str, Any], gallery: Mapping[str, Any]) -> bool:
    """Whether features of one model may be searched in a gallery of another; on the host.

    They may if the models share their frame, are the same model, or the gallery's model is an ancestor with which the
    query's model was kept aligned.
    """
    q, g = ({k: np.asarray(v) for k, v in record.items()} for record in (query, gallery))
    same = np.array_equal(q["frame"], g["frame"]) or np.array_equal(q["id"], g["id"])
    return bool(same or (q["aligned"] & (q["parents"] == g["id"]).all(-1)).any())


def check_comparable(query: Mapping[str, Any], gallery: Mapping[str, Any]) -> None:
    """Refuses to compare features of models that do not belong together; on the host.

    Args:
      query, gallery: the records of the two models.

    Raises:
      ValueError: they are not :func:`comparable`; both are named.
    """
    if not comparable(query, gallery):
        q, g = lineage_text(query), lineage_text(gallery)
        raise ValueError(
            f"features of query model {q['id']} (frame {q['frame']}) cannot be compared with those of gallery model "
            f"{g['id']} (frame {g['frame']}): they share no prototypes or anchors, and the first was not trained to "
            "stay aligned with the second; extract the gallery again with the query model"
        )


def lineage_text(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as plain text for a model's preprocessing facts: frame, id and ancestors in hexadecimal."""
    name = lambda words: "".join(f"{int(w):08x}" for w in np.asarray(words))  # noqa: E731
    parents, aligned = np.asarray(record["parents"]), np.asarray(record["aligned"])
    known = [i for i in range(len(parents)) if parents[i].any()]
    return {
        "frame": name(record["frame"]),
        "id": name(record["id"]),
        "parents": [name(parents[i]) for i in known],
        "aligned": [bool(aligned[i]) for i in known],
    }


def lineage_of_text(text: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Undoes :func:`lineage_text`.

    Raises:
      ValueError: it is no record.
    """
    try:
        words = lambda name: [int(name[:8], 16), int(name[8:], 16)]  # noqa: E731
        parents = np.zeros((ANCESTORS, 2), np.uint32)
        aligned = np.zeros(ANCESTORS, bool)
        for i, (name, kept) in enumerate(zip(text["parents"], text["aligned"], strict=True)):
            parents[i], aligned[i] = words(name), kept
        own = {k: jnp.asarray(words(text[k]), jnp.uint32) for k in ("frame", "id")}
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"not a lineage record: {text!r}") from None
    return {**own, "parents": jnp.asarray(parents), "aligned": jnp.asarray(aligned)}
