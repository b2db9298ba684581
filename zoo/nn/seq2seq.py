"""Decoding with a cache, for any decoder that can take one step: greedy and beam search, which stop early.

A decoder is here a function ``step(cache, tokens [N]) -> (logits [N, vocab], cache)``.  Rows end with the stop token,
which they then only repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Step = Callable[[Any, Array], tuple[Array, Any]]


def greedy(step: Step, cache: Any, start: Int[Array, "b"], length: int, stop: int) -> Int[Array, "b {length}"]:
    """The likeliest next token (ties: the lowest id) until every row has stopped, or ``length`` times.

    Args:
      step: one more token of the decoder.
      cache: its cache before the first.
      start: the first input of each row.
      length: the most tokens to make.
      stop: the token that ends a row; what follows it is ``stop`` too.

    Raises:
      ValueError: a length below 1.
    """
    _check(length)
    rows = start.shape[0]

    def unfinished(state):
        return (state[0] < length) & ~jnp.all(state[3])

    def one(state):
        at, last, made, done, cache = state
        logits, cache = step(cache, last)
        word = jnp.where(done, stop, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        made = jax.lax.dynamic_update_slice_in_dim(made, word[:, None], at, 1)
        return at + 1, word, made, done | (word == stop), cache

    made = jnp.full((rows, length), stop, jnp.int32)
    state = (jnp.int32(0), start.astype(jnp.int32), made, jnp.zeros(rows, bool), cache)
    return jax.lax.while_loop(unfinished, one, state)[2]


def beam_search(
    step: Step,
    cache: Any,
    start: Int[Array, "b"],
    length: int,
    stop: int,
    beams: int,
    reorder: Callable[[Any, Array], Any],
    length_penalty: float = 1.0,
) -> tuple[Int[Array, "b {length}"], Float[Array, "b"]]:
    """The best of ``beams`` continuations kept at each step by their summed log-probabilities.

    A finished continuation keeps its place and its score; at the end each is judged by its score over
    ``tokens ** length_penalty`` (the stop token counts).

    Args:
      step, start, length, stop: as for :func:`greedy`.
      cache: for ``b * beams`` rows, an example's beams side by side.
      beams: continuations kept, at most the vocabulary.
      reorder: ``(cache, rows [b * beams]) -> cache`` whose row i is the old ``rows[i]``, of the same example.
      length_penalty: 0 judges by the sum.

    Returns:
      The best continuation of each row and its judged score.

    Raises:
      ValueError: a length or a number of beams below 1.
    """
    _check(length)
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    rows = start.shape[0]

    def unfinished(state):
        return (state[0] < length) & ~jnp.all(state[4])

    def one(state):
        at, last, made, scores, done, cache = state
        logits, cache = step(cache, last.reshape(-1))
        logs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(rows, beams, -1)
        vocab = logs.shape[-1]
        only_stop = jnp.where(jnp.arange(vocab) == stop, 0.0, -jnp.inf)
        total = scores[..., None] + jnp.where(done[..., None], only_stop, logs)
        scores, at_best = jax.lax.top_k(total.reshape(rows, -1), beams)
        parent, word = at_best // vocab, (at_best % vocab).astype(jnp.int32)
        made = jnp.take_along_axis(made, parent[..., None], axis=1)
        made = jax.lax.dynamic_update_slice_in_dim(made, word[..., None], at, 2)
        done = jnp.take_along_axis(done, parent, axis=1) | (word == stop)
        cache = reorder(cache, (jnp.arange(rows)[:, None] * beams + parent).reshape(-1))
        return at + 1, word, made, scores, done, cache

    # all beams but the first start impossible, so that the first step does not choose one token several times
    scores = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (rows, beams))
    last = jnp.broadcast_to(start.astype(jnp.int32)[:, None], (rows, beams))
    made = jnp.full((rows, beams, length), stop, jnp.int32)
    state = (jnp.int32(0), last, made, scores, jnp.zeros((rows, beams), bool), cache)
    _, _, made, scores, _, _ = jax.lax.while_loop(unfinished, one, state)
    tokens = jnp.minimum(jnp.sum(made != stop, axis=2) + 1, length)
    judged = scores / tokens.astype(jnp.float32) ** length_penalty
    best = jnp.argmax(judged, axis=1)
    pick = lambda x: jnp.take_along_axis(x, best.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]  # noqa: E731
    return pick(made), pick(judged)


def _check(length: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
