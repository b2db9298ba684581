"""Cross-encoders: a query and an item are read together by one text encoder and get one score.

Two heads (Yadav et al., EMNLP 2022, section 4.2): ``cls`` scores the pooled first token; ``emb`` marks the mention in
the query and the title in the item by special tokens and scores by the inner product of their contextual vectors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Int

from zoo.nn.bert import BERT, BERTConfig

HEADS = ("cls", "emb")
"""Kinds of scores."""


def join_pairs(
    queries: Int[Array, "b q"], items: Int[Array, "b i"], pad_id: int = 0
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """``[CLS] query [SEP]`` and ``item [SEP]`` as one row of ids, and its token types (0 and 1; 0 at padding).

    Padding stays where it is, between the two parts too: :class:`CrossEncoder` gives padding no position and hides it,
    so that the result is the packed pair's.

    Args:
      queries: with their ``[CLS]`` and ``[SEP]``, padded.
      items: with their ``[SEP]`` only, padded.
      pad_id: what padding is.
    """
    types = jnp.concatenate([jnp.zeros_like(queries), (items != pad_id).astype(queries.dtype)], 1)
    return jnp.concatenate([queries, items.astype(queries.dtype)], 1), types


def check_tags(
    tokens: Any, tags: dict[str, int], what: str = "item", max_length: int | None = None, lengths: Any = None
) -> None:
    """Refuses texts in which a special token does not occur exactly once (on the host).

    Args:
      tokens: ids ``[n, t]``.
      tags: name -> id of the tokens that must be there.
      what: of the texts, for the message.
      max_length: how many tokens a text may have; for the message only.
      lengths: ``[n]``, how long each text was before it was cut, if that is known.

    Raises:
      ValueError: the first text that has none or several; says whether it was cut off.
    """
    tokens = np.asarray(tokens)
    for name, tag in tags.items():
        found = (tokens == tag).sum(1)
        bad = np.flatnonzero(found != 1)
        if bad.size:
            first = int(bad[0])
            cut = lengths is not None and max_length is not None and lengths[first] > max_length
            why = f"; the text has {lengths[first]} tokens and is cut to {max_length}" if cut else ""
            raise ValueError(
                f"{what} text must contain exactly one {name} tag, found {found[first]} (row {first}){why}"
            )


class CrossEncoder(nn.Module):
    """One score for a query and an item that are read together.

    Attributes:
      config: of the text encoder; its own head is ignored.
      head: ``cls``: pooler, dropout (``config.head_dropout``), linear map to one number; ``emb``: the inner product of
        the mean of the start and end tags' states (query) and the title tag's state (item), no further layer.
      tags: ``emb``: ids of the tags that start and end the mention and that end the title.
      pad_id: what padding is.
      dtype, param_dtype: of computation and parameters; scores are float32.
    """

    config: BERTConfig
    head: str = "cls"
    tags: tuple[int, int, int] | None = None
    pad_id: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Refuses an unknown head, and ``emb`` without its tags."""
        super().__post_init__()
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {self.head!r}")
        if self.head == "emb" and (self.tags is None or len(set(self.tags)) != 3):
            raise ValueError(f"head 'emb' needs tags, three different ids (start, end, title), got {self.tags}")

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b t"], token_types: Int[Array, "b t"], train: bool = False, keys: Array | None = None
    ) -> dict[str, Array]:
        """Scores pairs.

        Args:
          ids, token_types: from :func:`join_pairs`, or packed by a tokenizer; padding may lie anywhere but first.
          train, keys: dropout is on if both are given; one key per pair.

        Returns:
          ``scores`` f32 ``[B]``; with ``emb`` also ``query`` and ``item``, f32 ``[B, width]``, whose inner products the
          scores are.  A tag that is missing counts as the first token, of several the first one: :func:`check_tags`.
        """
        cls = self.head == "cls"
        own = {"head": "cross" if cls else "none", "head_activation": None, "next_sentence": False}
        config = dataclasses.replace(self.config, pooler=cls, **own)
        real = ids != self.pad_id
        # BERT counts positions from 0; RoBERTa's kin skip padding by themselves
        positions = jnp.maximum(jnp.cumsum(real, 1) - 1, 0) if config.pad_id is None else None
        body = BERT(config, self.dtype, self.param_dtype, name="body")
        types = token_types if config.token_types > 1 else None
        out = body(ids, padding_mask=real, token_types=types, positions=positions, train=train, keys=keys)
        if cls:
            return {"scores": out["scores"].astype(jnp.float32)}
        states = out["tokens"].astype(jnp.float32)
        start, end, title = (
            jnp.take_along_axis(states, jnp.argmax(ids == tag, 1)[:, None, None], 1)[:, 0] for tag in self.tags
        )
        query = (start + end) / 2
        return {"scores": jnp.sum(query * title, -1), "query": query, "item": title}
