"""Vision transformers (Dosovitskiy et al., 2021): ViT, DeiT with its distillation token, DINO, DINOv2 with registers.

    module = ViT(ViTConfig.base(classes=1000))
    out = module.apply(variables, images)               # images [B, H, W, 3], already normalised
    out["pooled"], out["tokens"][:, config.prefix:]     # one vector per image; one per patch, row by row

An image of another size runs with the same weights: the table of positions is resampled (:func:`resize_positions`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.attention import attention
from zoo.nn.dropout import dropout, layer_keys
from zoo.nn.partitioning import EMBED, HEADS, MLP, Dense, partitioned

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
POOLS = ("token", "mean", "token+mean", "none")
POSITIONS = ("all", "class", "patches", "none")
SMALL = nn.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """What a vision transformer is.  Tokens stand in the order class, distillation, registers, patches.

    Attributes:
      image_size: height and width for which the table of positions is made.
      patch_size: height and width of a patch.
      channels: of the images.
      width: of the residual stream.
      depth: blocks.
      num_heads: attention heads.
      mlp_width: hidden width of a block's feed-forward part.
      activation: one of ``ACTIVATIONS``.
      gated: ``activation(gate) * up`` in the feed-forward part (SwiGLU with ``silu``).
      patch_bias: whether the patch embedding has a bias.
      qkv_bias: whether queries, keys and values have one.
      qk_norm: layer norm of every head's queries and keys.
      pre_norm: layer norm before the first block (CLIP).
      layer_scale: initial value of a learned scale per channel on both branches; ``None`` for none.
      class_token: whether there is one.
      distilled: DeiT's second token, with a head of its own.
      registers: further learned tokens (Darcet et al., 2024).
      mask_token: whether there is a learned token that stands for masked patches (DINOv2's pretraining).
      positions: which tokens have a learned position: ``all``, ``class`` (class token and patches, not the registers),
        ``patches`` or ``none``.
      antialias: how positions are resampled, see :func:`resize_positions`.
      pool: ``token`` (the class token; DeiT: the mean of both), ``mean`` of the patches, ``token+mean`` (side by side)
        or ``none``.
      norm_after_pool: the final norm is applied to the pooled vector instead of the tokens.
      pooler: tanh of a linear map of the class token (the hub's ``ViTModel``).
      classes: size of the linear head; 0 for none.
      epsilon: of the norms.
      dropout: rate after the embeddings and on both branches.
      attention_dropout: rate on attention's result.
      drop_path: rate at which the last block's branches are dropped per example, rising linearly from 0.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    channels: int = 3
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu"
    gated: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    pre_norm: bool = False
    layer_scale: float | None = None
    class_token: bool = True
    distilled: bool = False
    registers: int = 0
    mask_token: bool = False
    positions: str = "all"
    antialias: bool = True
    pool: str = "token"
    norm_after_pool: bool = False
    pooler: bool = False
    classes: int = 0
    epsilon: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self):
        """Checks what can be checked without inputs."""
        for name, allowed in (("activation", ACTIVATIONS), ("pool", POOLS), ("positions", POSITIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width, got {self.num_heads} heads for width {self.width}")
        if not self.class_token and (self.pool.startswith("token") or self.pooler or self.distilled):
            raise ValueError(f"pool {self.pool!r}, pooler and distilled need class_token=True; else use pool='mean'")
        if self.distilled and (self.pool != "token" or self.registers or self.pooler):
            raise ValueError("distilled needs pool='token', no registers and no pooler")
        if self.pooler and self.pool != "token":
            raise ValueError(f"pooler needs pool='token', got {self.pool!r}")
        patches_of(self.image_size, self.patch_size)

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + int(self.distilled) + self.registers

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``image_size``."""
        return patches_of(self.image_size, self.patch_size)

    @property
    def placed(self) -> int:
        """Tokens before the patches that have a position."""
        return {"all": self.prefix, "class": int(self.class_token)}.get(self.positions, 0)

    @classmethod
    def small(cls, patch: int = 16, size: int = 224, **changes: Any) -> ViTConfig:
        """ViT-S, DeiT-S, DINO ViT-S: 22 million parameters."""
        return cls._square(patch, size, width=384, num_heads=6, mlp_width=1536, **changes)

    @classmethod
    def base(cls, patch: int = 16, size: int = 224, **changes: Any) -> ViTConfig:
        """ViT-B: 86 million parameters."""
        return cls._square(patch, size, **changes)

    @classmethod
    def large(cls, patch: int = 16, size: int = 224, **changes: Any) -> ViTConfig:
        """ViT-L: 304 million parameters."""
        return cls._square(patch, size, width=1024, depth=24, num_heads=16, mlp_width=4096, **changes)

    @classmethod
    def _square(cls, patch: int, size: int, **changes: Any) -> ViTConfig:
        return cls((size, size), (patch, patch), **changes)


def patches_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
      ValueError: an image that patches do not tile.
    """
    (h, w), (p, q) = image_size, patch_size
    if h % p or w % q or not h or not w:
        raise ValueError(
            f"image size {h} x {w} is not a multiple of patch_size {p} x {q}: crop, pad or resize the image"
        )
    return h // p, w // q


def resize_positions(
    table: Float[Array, "n d"],
    old: tuple[int, int],
    new: tuple[int, int],
    prefix: int = 1,
    antialias: bool = True,
) -> Float[Array, "m d"]:
    """Resamples a table of positions to another grid of patches, bicubically; the first ``prefix`` rows stay.

    Two filters are in use, and they differ by several per cent of the largest entry.  ``antialias=True`` is timm's,
    open_clip's and DINOv2-with-registers': Keys' cubic with a = -1/2, widened when the grid shrinks, renormalised at
    the border (``jax.image`` computes the same, to 3e-7).  ``antialias=False`` is that of the original DINO and of the
    hub's ViT, CLIP and DINOv2: a = -3/4, never widened, the border repeated.  Those codes that enlarge the target by
    0.1 patches against rounding are followed in the target's size only.

    Args:
      table: ``[prefix + rows * columns, width]``, row by row.
      old: rows and columns of the table.
      new: rows and columns wanted.
      prefix: rows of the table that belong to no patch.
      antialias: see above.

    Raises:
      ValueError: a table that is not ``prefix + old[0] * old[1]`` long.
    """
    if table.shape[0] != prefix + old[0] * old[1]:
        raise ValueError(f"table has {table.shape[0]} rows, but {prefix} + {old[0]} x {old[1]} was said")
    if tuple(old) == tuple(new):
        return table
    first, grid = table[:prefix], table[prefix:].astype(jnp.float32).reshape(*old, -1)
    if antialias:
        grid = jax.image.resize(grid, (*new, grid.shape[-1]), "cubic", antialias=True)
    else:
        rows, columns = (jnp.asarray(_cubic_weights(n, m)) for n, m in zip(old, new, strict=True))
        grid = jnp.einsum("ah,bw,hwd->abd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([first, grid.reshape(-1, grid.shape[-1]).astype(table.dtype)])


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """``[new, old]``: Keys' kernel with a = -3/4 at pixel centres, the border repeated."""
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for step in range(-1, 3):
        place = np.floor(centre) + step
        x = np.abs(centre - place)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(weights, (np.arange(new), np.clip(place, 0, old - 1).astype(int)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


def layer_norm(epsilon: float, dtype: Any, param_dtype: Any, name: str) -> nn.LayerNorm:
    """Layer norm with float32 statistics; the variance is of the differences, not a difference of means."""
    return nn.LayerNorm(epsilon, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name)


class Block(nn.Module):
    """One pre-norm transformer block: ``x + scale * attention(norm(x))``, then ``x + scale * mlp(norm(x))``.

    Attributes:
      num_heads, mlp_width, activation, gated, qkv_bias, qk_norm, layer_scale, epsilon: see :class:`ViTConfig`.
      causal: tokens see only those before them and themselves (text towers).
      dropout, attention_dropout, drop_path: rates in this block.
      dtype, param_dtype: of computation and parameters.
    """

    num_heads: int
    mlp_width: int
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    epsilon: float = 1e-6
    causal: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], mask: Bool[Array, "*#bnts"] | None = None, keys: Array | None = None
    ) -> Float[Array, "b t d"]:
        """``[B, T, width]`` to the same; ``mask``: where queries may look; ``keys``: one per example, for dropout."""
        y = self._attention(self._norm("attention_norm", x), mask, layer_keys(keys, 0))
        x = x + self._branch("attention_scale", y, layer_keys(keys, 1))
        y = self._mlp(self._norm("mlp_norm", x))
        return x + self._branch("mlp_scale", y, layer_keys(keys, 2))

    def _attention(self, x: Array, mask: Array | None, keys: Array | None) -> Array:
        b, t, width = x.shape
        q, k, v = (
            self._dense(width, (EMBED, HEADS), name, self.qkv_bias)(x).reshape(b, t, self.num_heads, -1)
            for name in ("query", "key", "value")
        )
        if self.qk_norm:
            q, k = self._norm("query_norm", q), self._norm("key_norm", k)
        y = attention(q, k, v, mask, causal=self.causal).reshape(b, t, width)
        y = dropout(y, self.attention_dropout, keys)
        return self._dense(width, (HEADS, EMBED), "out")(y)

    def _mlp(self, x: Array) -> Array:
        act = ACTIVATIONS[self.activation]
        y = self._dense(self.mlp_width, (EMBED, MLP), "up")(x)
        y = act(self._dense(self.mlp_width, (EMBED, MLP), "gate")(x)) * y if self.gated else act(y)
        return self._dense(x.shape[-1], (MLP, EMBED), "down")(y)

    def _branch(self, name: str, y: Array, keys: Array | None) -> Array:
        y = dropout(y, self.dropout, layer_keys(keys, 0))
        if self.layer_scale is not None:
            scale = self.param(name, nn.initializers.constant(self.layer_scale), y.shape[-1:], self.param_dtype)
            y = y * scale.astype(self.dtype)
        kept = dropout(jnp.ones(y.shape[0], y.dtype), self.drop_path, layer_keys(keys, 1))
        return y if keys is None else y * kept[:, None, None]

    def _norm(self, name: str, x: Array) -> Array:
        return layer_norm(self.epsilon, self.dtype, self.param_dtype, name)(x)

    def _dense(self, features: int, axes: tuple, name: str, use_bias: bool = True) -> Dense:
        init = nn.initializers.xavier_uniform()
        return Dense(features, axes, use_bias, self.dtype, self.param_dtype, init, name=name)


class ViT(nn.Module):
    """A vision transformer; see :class:`ViTConfig`.

    Attributes:
      config: what it is.
      dtype, param_dtype: of computation and parameters; softmax, norms' statistics and logits are float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    config: ViTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w c"],
        train: bool = False,
        keys: Array | None = None,
        masked: Bool[Array, "b n"] | None = None,
    ) -> dict[str, Float[Array, "b *dims"]]:
        """Images to features.

        Args:
          images: ``[B, H, W, channels]``, normalised as the weights expect; any multiple of the patch size.
          train: nothing depends on it; dropout follows ``keys``.
          keys: one key per example for dropout; ``None`` for none.
          masked: True for patches (row by row) whose embedding is replaced by the mask token.

        Returns:
          ``tokens [B, prefix + patches, width]`` after the final norm (before it, where the norm follows the pooling);
          ``pooled [B, width]`` (``token+mean``: twice as wide; none for ``pool="none"``); with a head ``logits
          [B, classes]`` (``pool="none"``: of every token); DeiT: also ``class_logits`` and ``distilled_logits``, whose
          mean ``logits`` is.

        Raises:
          ValueError: an image that patches do not tile, or with another number of channels; ``masked`` of another
            length than there are patches, or without a mask token.
        """
        c = self.config
        if images.shape[-1] != c.channels:
            raise ValueError(f"images have {images.shape[-1]} channels, but channels is {c.channels}")
        x = self._embed(images, masked)
        x = dropout(x, c.dropout, layer_keys(keys, c.depth))
        if c.pre_norm:
            x = self._norm("pre_norm", x)
        block = nn.remat(Block) if self.remat else Block
        for i in range(c.depth):
            x = block(
                c.num_heads, c.mlp_width, c.activation, c.gated, c.qkv_bias, c.qk_norm, c.layer_scale, c.epsilon,
                dropout=c.dropout, attention_dropout=c.attention_dropout,
                drop_path=c.drop_path * i / max(c.depth - 1, 1), dtype=self.dtype, param_dtype=self.param_dtype,
                name=f"layer{i}",
            )(x, keys=layer_keys(keys, i))  # fmt: skip
        if not c.norm_after_pool:
            x = self._norm("norm", x)
        out = {"tokens": x}
        pooled = self._pool(x)
        if c.norm_after_pool:
            pooled = self._norm("norm", pooled)
        if c.pool != "none":
            out["pooled"] = pooled
        if c.classes and c.distilled:
            out["class_logits"] = self._head("head", x[:, 0])
            out["distilled_logits"] = self._head("distilled_head", x[:, 1])
            out["logits"] = (out["class_logits"] + out["distilled_logits"]) / 2
        elif c.classes:
            out["logits"] = self._head("head", pooled)
        return out

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments that touch every parameter: images of one patch."""
        return {"images": jax.ShapeDtypeStruct((batch, *self.config.patch_size, self.config.channels), jnp.float32)}

    def _embed(self, images: Array, masked: Array | None) -> Array:
        c = self.config
        grid = patches_of(images.shape[1:3], c.patch_size)
        patches = nn.Conv(
            c.width, c.patch_size, c.patch_size, "VALID", use_bias=c.patch_bias, dtype=self.dtype,
            param_dtype=self.param_dtype, name="patches",
            kernel_init=partitioned(nn.initializers.lecun_normal(), None, None, None, EMBED),
        )(images)  # fmt: skip
        x = patches.reshape(images.shape[0], -1, c.width)
        if c.mask_token:
            token = self.param("mask_token", nn.initializers.zeros, (c.width,), self.param_dtype).astype(self.dtype)
        if masked is not None:
            if not c.mask_token or masked.shape[1] != x.shape[1]:
                raise ValueError(f"masked says {masked.shape[1]} of {x.shape[1]} patches; mask_token is {c.mask_token}")
            x = jnp.where(masked[:, :, None], token, x)
        table = None
        if c.positions != "none":
            shape = (c.placed + c.grid[0] * c.grid[1], c.width)
            table = self.param("positions", partitioned(SMALL, None, EMBED), shape, self.param_dtype)
            table = resize_positions(table, c.grid, grid, c.placed, c.antialias).astype(self.dtype)
            x = x + table[c.placed :]
        first = []
        if c.class_token:
            first.append(self.param("class_token", SMALL, (c.width,), self.param_dtype)[None])
        if c.distilled:
            first.append(self.param("distillation_token", SMALL, (c.width,), self.param_dtype)[None])
        if c.registers:
            init = partitioned(SMALL, None, EMBED)
            first.append(self.param("registers", init, (c.registers, c.width), self.param_dtype))
        if not first:
            return x
        prefix = jnp.concatenate(first).astype(self.dtype)
        if c.placed:
            prefix = jnp.concatenate([prefix[: c.placed] + table[: c.placed], prefix[c.placed :]])
        return jnp.concatenate([jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape)), x], axis=1)

    def _pool(self, x: Array) -> Array:
        c = self.config
        if c.pool == "none":
            return x
        mean = x[:, c.prefix :].mean(1)
        if c.pool == "mean":
            return mean
        if c.pool == "token+mean":
            return jnp.concatenate([x[:, 0], mean], -1)
        if c.distilled:
            return (x[:, 0] + x[:, 1]) / 2
        if c.pooler:
            return jnp.tanh(Dense(c.width, (EMBED, None), True, self.dtype, self.param_dtype, name="pooler")(x[:, 0]))
        return x[:, 0]

    def _norm(self, name: str, x: Array) -> Array:
        return layer_norm(self.config.epsilon, self.dtype, self.param_dtype, name)(x)

    def _head(self, name: str, x: Array) -> Array:
        # logits are float32 whatever the computation is
        return Dense(self.config.classes, (EMBED, None), True, jnp.float32, self.param_dtype, name=name)(x)
