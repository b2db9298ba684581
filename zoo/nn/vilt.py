"""ViLT: one transformer over words and image patches side by side (Kim et al., 2021).

The text is embedded as in BERT, the image by one linear map of its patches; both get a modality vector, and pre-norm
blocks read the row [text; class token; patches] (section 3.1).

Images of one batch may have different sizes: they lie in the upper left corner of a common frame, and ``pixel_mask``
says where.  The position table (a square grid) is stretched to each image's own grid.  The reference library then drops
the patches of the frame that no image of the batch needs and shuffles the others; here all patches of the frame stay,
in rows, and those outside the image are masked.  So text tokens, class token, ``pooled`` and every head are the same as
there, and the patches' tokens are the same up to order.  (It can also draw at most ``max_image_length`` patches at
random; here none are drawn.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.attention import MultiHeadAttention, padding_to_mask
from zoo.nn.bert import TextEmbeddings
from zoo.nn.bert_heads import ACTIVATIONS, MaskedLMHead, layer_norm
from zoo.nn.dropout import dropout, layer_keys
from zoo.nn.partitioning import EMBED, MLP, Dense, Embed, partitioned

HEAD_KINDS = ("none", "matching", "mlm", "vqa")


@dataclasses.dataclass(frozen=True)
class ViLTConfig:
    """What a ViLT is.

    Attributes:
      vocab_size: words.
      width: of the tokens.
      depth: blocks.
      num_heads: attention heads; must divide ``width``.
      mlp_width: of the feed-forward layer.
      max_positions: rows of the text's position table.
      token_types: kinds of text tokens.
      modalities: rows of the modality table: 0 text, 1 image, 2 a second image.
      image_size: side of the image for which the position table is made; a multiple of ``patch_size`` is wanted.
      patch_size: side of a patch.
      channels: of the images.
      qkv_bias: whether query, key and value have biases.
      activation: ``gelu`` (exact), ``gelu_tanh`` or ``relu``.
      epsilon: of all norms but the VQA head's, which has 1e-5.
      pooler: whether to make ``pooled``, a tanh layer on the first text token.
      head: ``none``; ``matching``: one score of how well image and text match; ``mlm``: a score per word and text
        token; ``vqa``: ``num_labels`` scores per pair.
      num_labels: answers of the VQA head.
      dropout: rate after embeddings, each attention's projection back and each feed-forward layer.
      attention_dropout: rate on the attention's result.
    """

    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 40
    token_types: int = 2
    modalities: int = 2
    image_size: int = 384
    patch_size: int = 32
    channels: int = 3
    qkv_bias: bool = True
    activation: str = "gelu"
    epsilon: float = 1e-12
    pooler: bool = True
    head: str = "none"
    num_labels: int = 3129
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self):
        """Refuses what does not fit together."""
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width {self.width}, got {self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.head not in HEAD_KINDS:
            raise ValueError(f"head must be one of {', '.join(HEAD_KINDS)}, got {self.head!r}")
        if self.head in ("matching", "vqa") and not self.pooler:
            raise ValueError(f"head {self.head!r} reads the pooler: set pooler=True")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size must not exceed image_size {self.image_size}, got {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along a side of the position table."""
        return self.image_size // self.patch_size

    @classmethod
    def b32(cls, **changes: Any) -> ViLTConfig:
        """ViLT-B/32: 111,595,008 parameters without a head."""
        return cls(**changes)


def stretch(places: int, size: Int[Array, "b"], grid: int) -> Float[Array, "b {places} {grid}"]:
    """Weights that stretch ``grid`` rows to each image's first ``size`` of ``places`` rows, linearly, corner on corner.

    Rows outside the image are zero.  Row i of an image of n lies at ``i * (grid - 1) / (n - 1)`` of the table.
    """
    step = (grid - 1) / jnp.maximum(size - 1, 1).astype(jnp.float32)
    step = jnp.where(size > 1, step, 0.0)
    row = jnp.arange(places)
    at = step[:, None] * row.astype(jnp.float32)
    weights = jnp.maximum(1.0 - jnp.abs(at[..., None] - jnp.arange(grid, dtype=jnp.float32)), 0.0)
    return jnp.where((row < size[:, None])[..., None], weights, 0.0)


def patch_mask(pixel_mask: Bool[Array, "b h w"], rows: int, columns: int) -> Bool[Array, "b {rows} {columns}"]:
    """Which patches belong to the image: those whose first pixel does (nearest-neighbour reduction)."""
    height, width = pixel_mask.shape[1:]
    pick = lambda size, count: (np.arange(count) * np.float32(size / count)).astype(np.int32)  # noqa: E731
    return pixel_mask[:, pick(height, rows)][:, :, pick(width, columns)]


class ImageEmbeddings(nn.Module):
    """Patches mapped to tokens, behind a class token, with stretched positions.

    Attributes:
      config, dtype, param_dtype: see :class:`SingleStreamVLM`.
    """

    config: ViLTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], pixel_mask: Bool[Array, "b h w"] | None
    ) -> tuple[Float[Array, "b n d"], Bool[Array, "b n"]]:
        """Tokens ``[B, 1 + patches, width]`` and which of them are real."""
        config = self.config
        side, batch = config.patch_size, images.shape[0]
        tokens = nn.Conv(
            config.width, (side, side), (side, side), padding="VALID", dtype=self.dtype, param_dtype=self.param_dtype,
            kernel_init=partitioned(nn.initializers.lecun_normal(), None, None, None, EMBED), name="patch",
        )(images.astype(self.dtype))  # fmt: skip
        rows, columns = tokens.shape[1:3]
        if pixel_mask is None:
            pixel_mask = jnp.ones(images.shape[:3], bool)
        real = patch_mask(pixel_mask, rows, columns)
        init = nn.initializers.normal(0.02)
        shape = (config.grid**2 + 1, config.width)
        table = self.param("position", partitioned(init, None, EMBED), shape, self.param_dtype).astype(jnp.float32)
        grid = table[1:].reshape(config.grid, config.grid, config.width)
        down = stretch(rows, jnp.sum(real[:, :, 0], axis=1), config.grid)
        along = stretch(columns, jnp.sum(real[:, 0, :], axis=1), config.grid)
        positions = jnp.einsum("bip,bjq,pqd->bijd", down, along, grid, precision="highest")
        tokens = (tokens + positions.astype(self.dtype)).reshape(batch, rows * columns, config.width)
        first = self.param("class_token", partitioned(init, EMBED), (config.width,), self.param_dtype)
        first = (first.astype(jnp.float32) + table[0]).astype(self.dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, config.width)), tokens], axis=1)
        return tokens, jnp.concatenate([jnp.ones((batch, 1), bool), real.reshape(batch, -1)], axis=1)


class ViLTBlock(nn.Module):
    """A pre-norm block: ``x + f(norm(x))`` for attention and the feed-forward layer.

    Attributes:
      config, dtype, param_dtype: see :class:`SingleStreamVLM`.
    """

    config: ViLTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], mask: Bool[Array, "b 1 1 t"], keys: Array | None
    ) -> Float[Array, "b t d"]:
        """``[B, T, width] -> [B, T, width]``; the mask tells which keys are real."""
        config = self.config
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = layer_norm(config.epsilon, name="attention_norm", **settings)(x)
        y = MultiHeadAttention(
            config.num_heads, use_bias=config.qkv_bias, attention_dropout=config.attention_dropout, name="attention",
            **settings,
        )(y, mask=mask, keys=layer_keys(keys, 0))  # fmt: skip
        x = x + dropout(y, config.dropout, layer_keys(keys, 1))
        y = layer_norm(config.epsilon, name="mlp_norm", **settings)(x)
        y = ACTIVATIONS[config.activation](Dense(config.mlp_width, (EMBED, MLP), name="up", **settings)(y))
        y = Dense(config.width, (MLP, EMBED), name="down", **settings)(y)
        return x + dropout(y, config.dropout, layer_keys(keys, 2))


class SingleStreamVLM(nn.Module):
    """ViLT with the head that its configuration names.

    Attributes:
      config: see :class:`ViLTConfig`.
      dtype, param_dtype: of computation and parameters; logits are float32.
      remat: whether blocks are recomputed in the backward pass instead of kept.
    """

    config: ViLTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"] | None = None,
        images: Float[Array, "b h w c"] | None = None,
        padding_mask: Bool[Array, "b t"] | None = None,
        pixel_mask: Bool[Array, "b h w"] | None = None,
        token_types: Int[Array, "b t"] | None = None,
        embeddings: Float[Array, "b t d"] | None = None,
        image_embeddings: Float[Array, "b n d"] | None = None,
        image_mask: Bool[Array, "b n"] | None = None,
        image_type: int = 1,
        hidden_states: bool = False,
        train: bool = False,
        keys: Array | None = None,
    ) -> dict[str, Any]:
        """Reads pairs of text and image.

        Args:
          ids: word ids ``[B, T]``.
          images: ``[B, H, W, channels]``, normalised, each in the upper left corner of the frame.
          padding_mask: True where there is a real text token.
          pixel_mask: True where there is image ``[B, H, W]``.
          token_types: of the text tokens; 0 by default.
          embeddings: ``[B, T, width]`` in place of the word table's rows (positions, types and norm are still added).
          image_embeddings: ``[B, N, width]`` in place of class token, patches and positions.
          image_mask: which of the image embeddings are real.
          image_type: the image's row of the modality table (2 for a second image).
          hidden_states: whether to return every block's input and the last one's output (before the final norm).
          train, keys: dropout is on if both are given; one key per example.

        Returns:
          A dict: ``tokens [B, T + 1 + patches, width]`` after the final norm; ``mask``, which of
          them are real; ``text_tokens [B, T, width]`` and ``image_tokens [B, 1 + patches, width]``, its parts;
          ``hidden_states`` (on request), ``depth + 1`` arrays like ``tokens``; ``pooled [B, width]``; ``scores [B]``
          (matching); ``logits``: ``[B, T, vocab]`` (mlm) or ``[B, num_labels]`` (vqa).

        Raises:
          ValueError: neither or both of ids and embeddings, or of images and image embeddings; a text longer than the
            position table; images smaller than a patch or of other channels; an unknown ``image_type``.
        """
        config = self.config
        keys = keys if train else None
        self._check(ids, embeddings, images, image_embeddings, image_type)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        table = TextEmbeddings(
            config.vocab_size, config.width, config.max_positions, config.token_types, config.epsilon, name="text",
            **settings,
        )  # fmt: skip
        length = (ids if embeddings is None else embeddings).shape[1]
        text = table(ids, embeddings, jnp.arange(length)[None], token_types)
        if image_embeddings is None:
            image, image_mask = ImageEmbeddings(config, name="image", **settings)(images, pixel_mask)
            image = dropout(image, config.dropout, layer_keys(keys, 1))
        else:
            image = image_embeddings.astype(self.dtype)
        modality = Embed(config.modalities, config.width, (None, EMBED), name="modality", **settings)
        text = dropout(text, config.dropout, layer_keys(keys, 0)) + modality(jnp.zeros((1, 1), jnp.int32))
        x = jnp.concatenate([text, image + modality(jnp.full((1, 1), image_type))], axis=1)
        whole = lambda mask, y: jnp.ones(y.shape[:2], bool) if mask is None else mask  # noqa: E731
        mask = jnp.concatenate([whole(padding_mask, text), whole(image_mask, image)], axis=1)
        states = [x]
        block = nn.remat(ViLTBlock) if self.remat else ViLTBlock
        for i in range(config.depth):
            x = block(config, name=f"layer{i}", **settings)(x, padding_to_mask(mask), layer_keys(keys, i + 2))
            states.append(x)
        x = layer_norm(config.epsilon, name="norm", **settings)(x)
        out = {"tokens": x, "mask": mask, "text_tokens": x[:, :length], "image_tokens": x[:, length:]}
        if hidden_states:
            out["hidden_states"] = tuple(states)
        return out | self._heads(x[:, :length], table)

    def _heads(self, text: Array, table: TextEmbeddings) -> dict[str, Array]:
        config, out = self.config, {}
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        exact = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        if config.pooler:
            out["pooled"] = jnp.tanh(Dense(config.width, (EMBED, None), name="pooler", **settings)(text[:, 0]))
        if config.head == "matching":
            pooled = out["pooled"].astype(jnp.float32)
            out["scores"] = Dense(1, (EMBED, None), name="matching", **exact)(pooled)[:, 0]
        if config.head == "mlm":
            head = MaskedLMHead(config.vocab_size, config.activation, config.epsilon, name="mlm", **settings)
            out["logits"] = head(text, table.table())
        if config.head == "vqa":
            y = Dense(2 * config.width, (EMBED, MLP), name="vqa_up", **settings)(out["pooled"])
            y = ACTIVATIONS["gelu"](layer_norm(1e-5, name="vqa_norm", **settings)(y)).astype(jnp.float32)
            out["logits"] = Dense(config.num_labels, (MLP, None), name="vqa_out", **exact)(y)
        return out

    def _check(self, ids, embeddings, images, image_embeddings, image_type):
        config = self.config
        for one, other, names in (
            (ids, embeddings, "ids or embeddings"),
            (images, image_embeddings, "images or image_embeddings"),
        ):
            if (one is None) == (other is None):
                raise ValueError(f"give either {names}, got " + ("neither" if one is None else "both"))
        length = (ids if embeddings is None else embeddings).shape[1]
        if length > config.max_positions:
            raise ValueError(f"the texts have {length} tokens, but there are positions for {config.max_positions}")
        if not 0 <= image_type < config.modalities:
            raise ValueError(f"image_type must be below config.modalities = {config.modalities}, got {image_type}")
        if images is not None and (min(images.shape[1:3]) < config.patch_size or images.shape[3] != config.channels):
            raise ValueError(
                f"images must be [B, H, W, {config.channels}] with sides of at least a patch of {config.patch_size}, "
                f"got {list(images.shape)}"
            )

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Keyword arguments that touch every parameter."""
        side = self.config.patch_size
        return {
            "ids": jax.ShapeDtypeStruct((batch, 1), jnp.int32),
            "images": jax.ShapeDtypeStruct((batch, side, side, self.config.channels), jnp.float32),
        }
