"""CLIP (Radford et al., 2021): an image tower and a causal text tower whose pooled vectors are compared.

module = CLIP(CLIPConfig.vit_b32())
out = module.apply(variables, images=images, ids=ids)
out["image"]["pooled"], out["text"]["pooled"], out["logits"]
module.apply(variables, ids, method="encode_text")       # one tower alone
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.attention import padding_to_mask
from zoo.nn.clip_resnet import CLIPResNet, CLIPResNetConfig
from zoo.nn.dropout import layer_keys
from zoo.nn.partitioning import EMBED, Dense, Embed, partitioned
from zoo.nn.vit import ACTIVATIONS, Block, ViT, ViTConfig, layer_norm


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """What the text tower is.

    Attributes:
      vocabulary: number of token ids.
      context: longest text in tokens.
      width: of the residual stream.
      depth: blocks.
      num_heads: attention heads.
      mlp_width: hidden width of a block's feed-forward part.
      activation: one of ``zoo.nn.vit.ACTIVATIONS``.
      layer_scale: initial value of a learned scale per channel on both branches; ``None`` for none.
      eot_id: the text's vector is that of the first token with this id; ``None``: of the largest id (OpenAI's rule,
        which added tokens break).
      epsilon: of the norms.
      attention_dropout: rate on attention's result.
    """

    vocabulary: int = 49408
    context: int = 77
    width: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_width: int = 2048
    activation: str = "quick_gelu"
    layer_scale: float | None = None
    eot_id: int | None = None
    epsilon: float = 1e-5
    attention_dropout: float = 0.0

    def __post_init__(self):
        """Checks what can be checked without inputs."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width, got {self.num_heads} heads for width {self.width}")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """What the two towers are.

    Attributes:
      image: a vision transformer (``pre_norm`` and without a patch bias in CLIP) or the modified residual network.
      text: the text tower.
      features: size of the space in which images and texts are compared.
    """

    image: ViTConfig | CLIPResNetConfig
    text: CLIPTextConfig = CLIPTextConfig()
    features: int = 512

    def __post_init__(self):
        """Checks that the towers fit."""
        if isinstance(self.image, CLIPResNetConfig) and self.image.features != self.features:
            raise ValueError(f"image.features must be features, got {self.image.features} and {self.features}")

    @classmethod
    def vit_b32(cls, size: int = 224) -> CLIPConfig:
        """ViT-B/32: 151 million parameters."""
        return cls(ViTConfig.base(32, size, **TOWER))

    @classmethod
    def vit_b16(cls, size: int = 224) -> CLIPConfig:
        """ViT-B/16: 150 million parameters."""
        return cls(ViTConfig.base(16, size, **TOWER))

    @classmethod
    def vit_l14(cls, size: int = 224) -> CLIPConfig:
        """ViT-L/14 (``size=336``: L/14@336px): 428 million parameters."""
        text = CLIPTextConfig(width=768, num_heads=12, mlp_width=3072)
        return cls(ViTConfig.large(14, size, **TOWER), text, 768)

    @classmethod
    def rn50(cls) -> CLIPConfig:
        """RN50: 102 million parameters."""
        return cls(CLIPResNetConfig(), CLIPTextConfig(), 1024)


TOWER = {"patch_bias": False, "pre_norm": True, "activation": "quick_gelu", "epsilon": 1e-5}
"""How CLIP's vision transformer differs from ViT."""


class CLIPText(nn.Module):
    """The text tower: token and position tables, causal blocks, a final norm; see :class:`CLIPTextConfig`.

    Attributes:
      config: what it is.
      dtype, param_dtype, remat: see :class:`CLIP`.
    """

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        """The table of tokens, which other methods read too."""
        c = self.config
        self.tokens = Embed(c.vocabulary, c.width, dtype=self.dtype, param_dtype=self.param_dtype)

    def embed(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Rows of the token table, without positions: what ``embeddings`` stands for."""
        return self.tokens(ids)

    @nn.compact
    def __call__(
        self,
        embeddings: Float[Array, "b t d"],
        padding_mask: Bool[Array, "b t"] | None = None,
        keys: Array | None = None,
    ) -> Float[Array, "b t d"]:
        """``[B, T, width] -> [B, T, width]`` after the final norm."""
        c = self.config
        if embeddings.shape[-1] != c.width:
            raise ValueError(f"embeddings are {embeddings.shape[-1]} wide, but the text tower's width is {c.width}")
        if embeddings.shape[1] > c.context:
            raise ValueError(f"texts have {embeddings.shape[1]} tokens, but context is {c.context}: cut them")
        init = partitioned(nn.initializers.normal(0.01), None, EMBED)
        table = self.param("positions", init, (c.context, c.width), self.param_dtype)
        x = embeddings.astype(self.dtype) + table[: embeddings.shape[1]].astype(self.dtype)
        block = nn.remat(Block) if self.remat else Block
        for i in range(c.depth):
            x = block(
                c.num_heads, c.mlp_width, c.activation, layer_scale=c.layer_scale, epsilon=c.epsilon, causal=True,
                attention_dropout=c.attention_dropout, dtype=self.dtype, param_dtype=self.param_dtype, name=f"layer{i}",
            )(x, padding_to_mask(padding_mask), layer_keys(keys, i))  # fmt: skip
        return layer_norm(c.epsilon, self.dtype, self.param_dtype, "norm")(x)


class CLIP(nn.Module):
    """Images and texts in one space; see :class:`CLIPConfig`.

    Attributes:
      config: what it is.
      dtype, param_dtype: of computation and parameters; softmax, norms' statistics and logits are float32.
      remat: recompute each block's activations in the backward pass.
      axis_name: the mapped axis over which the residual network's batch statistics are global.
    """

    config: CLIPConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    axis_name: str | None = None

    def setup(self):
        """The towers, their projections and the temperature."""
        c, settings = self.config, (self.dtype, self.param_dtype, self.remat)
        if isinstance(c.image, CLIPResNetConfig):
            self.image = CLIPResNet(c.image, *settings, axis_name=self.axis_name)
        else:
            self.image = ViT(c.image, *settings)
            self.image_projection = self._projection(c.image.width)
        self.text = CLIPText(c.text, *settings)
        self.text_projection = self._projection(c.text.width)
        self.log_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), (), self.param_dtype)

    def __call__(
        self,
        images: Float[Array, "b h w c"] | None = None,
        ids: Int[Array, "n t"] | None = None,
        embeddings: Float[Array, "n t d"] | None = None,
        padding_mask: Bool[Array, "n t"] | None = None,
        eot: Int[Array, "n"] | None = None,
        train: bool = False,
        mask: Bool[Array, "b"] | None = None,
        keys: Array | None = None,
    ) -> dict[str, Any]:
        """Both towers, or the one that is given something.

        Args:
          images: see :meth:`encode_image`.
          ids, embeddings, padding_mask, eot: see :meth:`encode_text`.
          train: whether batch statistics (residual network) are the batch's.
          mask: which rows count in them.
          keys: one key per example for dropout.

        Returns:
          ``image`` and ``text``: what the two methods return; ``logit_scale``: the factor (not its logarithm), a
          float32 scalar; with both, ``logits [B, N]``: scaled cosines of every image and every text, float32.

        Raises:
          ValueError: neither images nor texts, and what the two methods raise.
        """
        texts = ids is not None or embeddings is not None
        if images is None and not texts:
            raise ValueError("give images, ids or embeddings")
        out: dict[str, Any] = {"logit_scale": jnp.exp(self.log_scale.astype(jnp.float32))}
        if images is not None:
            out["image"] = self.encode_image(images, train, mask, layer_keys(keys, 0))
        if texts:
            out["text"] = self.encode_text(ids, embeddings, padding_mask, eot, layer_keys(keys, 1))
        if images is not None and texts:
            a, b = (_unit(out[tower]["pooled"]) for tower in ("image", "text"))
            out["logits"] = out["logit_scale"] * (a @ b.T)
        return out

    def encode_image(
        self,
        images: Float[Array, "b h w c"],
        train: bool = False,
        mask: Bool[Array, "b"] | None = None,
        keys: Array | None = None,
    ) -> dict[str, Any]:
        """The image tower.

        Args:
          images: ``[B, H, W, 3]``, normalised; any multiple of the patch size (residual network: of 32).
          train, mask: see :meth:`__call__`.
          keys: one key per example for dropout.

        Returns:
          ``pooled [B, features]`` and ``tokens [B, 1 + patches, features]``, both after the final norm and the
          projection (the class token first; of the residual network, the attention pooling with each place as the
          query).  ViT: also ``hidden [B, 1 + patches, width]``, before the projection.  Residual network: also its
          feature maps ``stem`` and ``stages``.
        """
        if isinstance(self.config.image, CLIPResNetConfig):
            return self.image(images, train, mask)
        found = self.image(images, train, keys)
        project = self.image_projection
        return {"pooled": project(found["pooled"]), "tokens": project(found["tokens"]), "hidden": found["tokens"]}

    def encode_text(
        self,
        ids: Int[Array, "b t"] | None = None,
        embeddings: Float[Array, "b t d"] | None = None,
        padding_mask: Bool[Array, "b t"] | None = None,
        eot: Int[Array, "b"] | None = None,
        keys: Array | None = None,
    ) -> dict[str, Array]:
        """The text tower.

        Args:
          ids: token ids, up to ``context`` long.
          embeddings: ``[B, T, width]`` instead of the ids' rows of the token table (learned prompts; see
            :meth:`embed_text`).  Ids that are given too only tell where the text ends.
          padding_mask: True for real tokens; the others are not attended to.
          eot: position of each text's last token, whose vector is the text's.  By default the position that the ids
            tell (``CLIPTextConfig.eot_id``); without ids the last real token.
          keys: one key per example for dropout.

        Returns:
          ``pooled [B, features]`` and ``tokens [B, T, features]``, both after the final norm and the projection;
          ``hidden [B, T, width]``, before the projection.

        Raises:
          ValueError: neither ids nor embeddings, texts longer than the context, embeddings of another width.
        """
        if ids is None and embeddings is None:
            raise ValueError("encode_text needs ids or embeddings")
        x = self.text.embed(ids) if embeddings is None else embeddings
        hidden = self.text(x, padding_mask, keys)
        if eot is None:
            eot = self._eot(ids, padding_mask, hidden.shape)
        tokens = self.text_projection(hidden)
        pooled = jnp.take_along_axis(tokens, eot[:, None, None], axis=1)[:, 0]
        return {"pooled": pooled, "tokens": tokens, "hidden": hidden}

    def embed_text(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The ids' rows of the token table: ``encode_text(ids, embed_text(ids))`` is ``encode_text(ids)``."""
        return self.text.embed(ids)

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments that touch every parameter: the smallest image and texts of one token."""
        kind = CLIPResNet if isinstance(self.config.image, CLIPResNetConfig) else ViT
        image = kind(self.config.image, parent=None)
        return {**image.example_inputs(batch), "ids": jax.ShapeDtypeStruct((batch, 1), jnp.int32)}

    def _eot(self, ids: Array | None, padding_mask: Array | None, shape: tuple[int, ...]) -> Array:
        if ids is not None and self.config.text.eot_id is not None:
            return jnp.argmax(ids == self.config.text.eot_id, axis=1)
        if ids is not None:
            return jnp.argmax(ids, axis=1)
        if padding_mask is not None:
            return shape[1] - 1 - jnp.argmax(padding_mask[:, ::-1], axis=1)
        return jnp.full(shape[0], shape[1] - 1)

    def _projection(self, width: int) -> Dense:
        init = nn.initializers.normal(width**-0.5)
        return Dense(self.config.features, (EMBED, None), False, self.dtype, self.param_dtype, init)


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
