"""Attention: the one function through which every backbone goes, and the multi-head block that most of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.dropout import dropout
from zoo.nn.partitioning import EMBED, HEADS, Dense


def attention(
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s m d"],
    value: Float[Array, "b s m d"],
    mask: Bool[Array, "*#bnts"] | None = None,
    bias: Float[Array, "*#bnts"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> Float[Array, "b t n d"]:
    """Softmax attention (Vaswani et al., 2017, equation 1) by ``jax.nn.dot_product_attention``.

    The softmax is float32.  Where the device has a fused kernel that takes these arguments (cuDNN from Ampere on,
    half precision, head width a multiple of 8 up to 128), it is used; elsewhere XLA compiles the plain form.

    Args:
      query, key, value: ``[B, T, heads, width]``; the heads of query are a multiple of those of key and value
        (grouped queries: head ``n`` reads key head ``n // (N / M)``).
      mask: True where a query may look, broadcastable to ``[B, N, T, S]``.  A query that may look nowhere gets a finite
        result that means nothing.
      bias: added to the scaled scores, broadcastable to ``[B, N, T, S]``.
      causal: query t sees keys up to t (positions counted from the start of both).
      scale: of the scores; ``1 / sqrt(width)`` by default.
      window: a query sees only the last ``window`` keys up to itself (sliding window; use with ``causal``).
    """
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, is_causal=causal, scale=scale,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn" if _has_kernel(query, key, mask is not None or bias is not None) else "xla",
    )  # fmt: skip


def attention_probabilities(
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s n d"],
    mask: Bool[Array, "*#bnts"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "b n t s"]:
    """What :func:`attention` weighs values by: float32 ``[B, N, T, S]``, each row sums to 1 over the keys it may see.

    The whole array is made (:func:`attention` need not make it), so ask for one layer's.  Arguments as there; a query
    that may look nowhere has a row of zeros.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("btnd,bsnd->bnts", query, key, preferred_element_type=jnp.float32) * scale
    shown = jnp.ones((), bool) if mask is None else mask
    if causal:
        shown = shown & jnp.tri(query.shape[1], key.shape[1], dtype=bool)
    return jax.nn.softmax(scores, axis=-1, where=jnp.broadcast_to(shown, scores.shape))


def _has_kernel(query: Array, key: Array, biased: bool) -> bool:
    # cuDNN's own conditions; with a bias (a mask is one) and an odd length it has no gradient
    if jax.default_backend() != "gpu" or query.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    major = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    if not major.isdigit() or int(major) < 8:  # before Ampere, or no NVIDIA GPU
        return False
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    return query.shape[-1] <= 128 and query.shape[-1] % 8 == 0 and (even or not biased)


def padding_to_mask(padding_mask: Bool[Array, "b s"] | None) -> Bool[Array, "b 1 1 s"] | None:
    """Which keys are real, as a mask of scores; ``None`` stays ``None``."""
    return None if padding_mask is None else padding_mask[:, None, None, :]


class MultiHeadAttention(nn.Module):
    """Projections to heads, :func:`attention`, and the projection back: ``query``, ``key``, ``value``, ``out``.

    Kernels are matrices ``[width, heads * head_dim]``, heads side by side.

    Attributes:
      num_heads: heads.
      head_dim: width of a head; by default the input's width over ``num_heads``.
      features: size of the result; by default the input's width.
      use_bias: of the query, key and value projections.
      out_bias: of the projection back.
      scale: of the scores, as in :func:`attention`.
      attention_dropout: rate on the attention's result before the projection back; see :mod:`zoo.nn.dropout`.
      dtype, param_dtype: of computation and parameters.
      kernel_init: of all four kernels.
    """

    num_heads: int
    head_dim: int | None = None
    features: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    scale: float | None = None
    attention_dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t i"],
        context: Float[Array, "b s j"] | None = None,
        mask: Bool[Array, "*#bnts"] | None = None,
        bias: Float[Array, "*#bnts"] | None = None,
        causal: bool = False,
        keys: Array | None = None,
        cache: tuple[Array, Array] | None = None,
        index: Int[Array, ""] | None = None,
        probabilities: bool = False,
    ) -> Float[Array, "b t o"] | tuple[Float[Array, "b t o"], dict[str, Any]]:
        """Self-attention over ``x``, or cross-attention from ``x`` to ``context``.

        Args:
          x: ``[B, T, width]``.
          context: ``[B, S, width']`` whose keys and values are read; ``x`` itself by default.
          mask, bias, causal: see :func:`attention`.
          keys: one key per example for dropout; ``None`` outside training.
          cache: keys and values ``[B, L, heads, head_dim]`` to attend to; with ``index`` those of ``x`` (or of
            ``context``) are written there first, without it the cache is read as it is.
          index: where new keys and values go, counted in tokens.
          probabilities: whether to return what :func:`attention_probabilities` gives.

        Returns:
          ``[B, T, features]``; with ``cache`` or ``probabilities`` beside it a dict with ``cache`` and, on request,
          ``probabilities [B, heads, T, S]``.

        Raises:
          ValueError: the heads do not divide the width, and no ``head_dim`` is given.
        """
        if self.head_dim is None and x.shape[-1] % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} does not divide the width {x.shape[-1]}; give head_dim")
        width = self.head_dim or x.shape[-1] // self.num_heads
        context = x if context is None else context
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": self.kernel_init}

        def heads(y, name):
            inner = self.num_heads * width
            y = Dense(inner, (EMBED, HEADS), self.use_bias, name=name, **settings)(y)
            return y.reshape(*y.shape[:-1], self.num_heads, width)

        q = heads(x, "query")
        if cache is None or index is not None:
            k, v = heads(context, "key"), heads(context, "value")
        if cache is not None:
            place = lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, 1)  # noqa: E731
            k, v = cache if index is None else (place(cache[0], k), place(cache[1], v))
        y = attention(q, k, v, mask, bias, causal, self.scale)
        y = dropout(y.reshape(*y.shape[:2], -1), self.attention_dropout, keys)
        features = self.features or x.shape[-1]
        y = Dense(features, (HEADS, EMBED), self.out_bias, name="out", **settings)(y)
        if cache is None and not probabilities:
            return y
        seen = {"probabilities": attention_probabilities(q, k, mask, causal, self.scale)} if probabilities else {}
        return y, {"cache": (k, v), **seen}
