"""Continuing prompts: one pass over them, then one scanned step per token, for every model with a cache."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Int


def generate(
    module: nn.Module,
    variables: Any,
    ids: Int[Array, "b t"],
    steps: int,
    padding_mask: Bool[Array, "b t"] | None = None,
    keys: Array | None = None,
    temperature: float = 1.0,
    stop: int | None = None,
) -> Int[Array, "b steps"]:
    """Continues each row of ``ids`` by ``steps`` tokens.

    Args:
      module: a model with a cache: :class:`zoo.nn.decoder_lm.DecoderLM`, or :class:`zoo.nn.mamba.Mamba` if prompts are
        padded on the left.
      variables: its variables.
      ids: prompts.
      steps: tokens to add.
      padding_mask: True at the prompts' real tokens.
      keys: one key per row: tokens are drawn from the softmax of ``logits / temperature``; ``None``: the most likely
        one is taken (greedy).
      temperature: above 0.
      stop: a token after which a row only repeats it.

    Raises:
      ValueError: no step, or a temperature that is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; leave keys out for greedy decoding")
    batch, length = ids.shape
    real = jnp.ones((batch, length), bool) if padding_mask is None else padding_mask

    def choose(logits, step):
        if keys is None:
            return jnp.argmax(logits, axis=-1).astype(ids.dtype)
        drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(jax.random.categorical)(drawn, logits / temperature).astype(ids.dtype)

    def step(state, number):
        cache, token, done = state
        out = module.apply(variables, token[:, None], cache=cache)
        following = choose(out.logits[:, -1], number)
        following = jnp.where(done, token, following)
        return (out.cache, following, done | (following == stop) if stop is not None else done), following

    out = module.apply(variables, ids, padding_mask, cache=module.init_cache(batch, length + steps - 1))
    last = length - 1 - jnp.argmax(real[:, ::-1], axis=1)
    first = choose(jnp.take_along_axis(out.logits, last[:, None, None], axis=1)[:, 0], 0)
    done = first == stop if stop is not None else jnp.zeros(batch, bool)
    _, rest = lax.scan(step, (out.cache, first, done), jnp.arange(1, steps))
    return jnp.concatenate([first[:, None], rest.T.astype(ids.dtype)], axis=1)
