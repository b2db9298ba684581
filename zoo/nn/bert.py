"""Bidirectional text encoders of the BERT family: one module for BERT, RoBERTa and DistilBERT, chosen by configuration.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019; Liu et al., "RoBERTa", 2019; Sanh et al.,
"DistilBERT", 2019.  The heads follow Reimers and Gurevych, "Sentence-BERT", 2019 (dual and cross-encoder) and Khattab
and Zaharia, "ColBERT", 2020.  Blocks are post-norm: ``x = norm(x + f(x))``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.attention import MultiHeadAttention, padding_to_mask
from zoo.nn.bert_heads import ACTIVATIONS, MaskedLMHead, SentenceHead, l2_normalise, layer_norm, masked_mean
from zoo.nn.dropout import dropout, layer_keys
from zoo.nn.partitioning import EMBED, HEADS, MLP, Dense, Embed, unbox

HEAD_KINDS = ("none", "mlm", "classifier", "dual", "cross", "colbert")


@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """What a model of the BERT family is.

    Attributes:
      vocab_size: words.
      width: of the tokens.
      depth: blocks.
      num_heads: attention heads; must divide ``width``.
      mlp_width: of the feed-forward layer.
      max_positions: rows of the position table.
      token_types: kinds of tokens (first or second sentence); 0 for none (DistilBERT).
      pad_id: ``None``: positions count from 0 (BERT).  A number: they count the ids that differ from it, from
        ``pad_id + 1`` on, and padding has position ``pad_id`` (RoBERTa), so that texts may have
        ``max_positions - pad_id - 1`` tokens.
      activation: ``gelu`` (exact), ``gelu_tanh`` or ``relu``.
      epsilon: of all norms.
      causal: whether a token sees only those before it (decoder use).
      cross_attention: whether each block also reads a ``context``, if the call has one: a decoder's, or, without
        ``causal``, the weights of an encoder and of a fusion encoder in one (the context must be there at ``init``).
      pooler: whether to make ``pooled``, a tanh layer on the first token.
      next_sentence: whether to score "is the next sentence" from ``pooled`` (BERT's pre-training).
      head: ``none``; ``mlm``: a score per word and token; ``classifier``: ``num_labels`` scores per text; ``cross``:
        one score per text; ``dual``: one vector per text; ``colbert``: one short unit vector per token.
      num_labels: of the classifier.
      head_activation: classifier and cross: ``None`` reads ``pooled`` (BERT); ``tanh`` (RoBERTa) or ``relu``
        (DistilBERT) put a square hidden layer of the head's own on the first token.
      mlm_activation: of the MLM head; ``None`` for ``activation`` (RoBERTa's is exact gelu whatever that is).
      tied: whether the MLM head scores against the word table.
      pooling: of the dual encoder: ``cls`` (first token) or ``mean`` (of real tokens).
      projection: width of the linear map of dual (``None``: no map) and ColBERT heads.
      projection_bias: whether the dual encoder's map has a bias (ColBERT's has none).
      normalise: whether the dual encoder's vectors have length one (ColBERT's always have).
      dropout: rate after the embeddings, each attention's projection back and each feed-forward layer.
      attention_dropout: rate on the attention's result.
      attention_out_dropout: rate after the attention's projection back, if it is not ``dropout`` (DistilBERT: 0).
      head_dropout: rate in the classifier.
    """

    vocab_size: int = 30522
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    token_types: int = 2
    pad_id: int | None = None
    activation: str = "gelu"
    epsilon: float = 1e-12
    causal: bool = False
    cross_attention: bool = False
    pooler: bool = False
    next_sentence: bool = False
    head: str = "none"
    num_labels: int = 2
    head_activation: str | None = None
    mlm_activation: str | None = None
    tied: bool = True
    pooling: str = "mean"
    projection: int | None = None
    projection_bias: bool = True
    normalise: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1
    attention_out_dropout: float | None = None
    head_dropout: float = 0.1

    def __post_init__(self):
        """Refuses what does not fit together."""
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width {self.width}, got {self.num_heads}")
        for name in ("activation", "head_activation", "mlm_activation"):
            value = getattr(self, name)
            if value is not None and value not in ACTIVATIONS:
                raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")
        if self.head not in HEAD_KINDS:
            raise ValueError(f"head must be one of {', '.join(HEAD_KINDS)}, got {self.head!r}")
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f"pooling must be cls or mean, got {self.pooling!r}")
        if self.head == "colbert" and self.projection is None:
            raise ValueError("head 'colbert' needs projection, the width of its vectors (128 as published)")
        reads_pooled = self.next_sentence or (self.head in ("classifier", "cross") and self.head_activation is None)
        if reads_pooled and not self.pooler:
            raise ValueError(f"head {self.head!r} reads the pooler: set pooler=True or give it a head_activation")

    @classmethod
    def base(cls, **changes: Any) -> BERTConfig:
        """BERT-base, uncased: 109,482,240 parameters with the pooler."""
        return cls(**{"pooler": True, **changes})

    @classmethod
    def large(cls, **changes: Any) -> BERTConfig:
        """BERT-large, uncased."""
        return cls(**{"width": 1024, "depth": 24, "num_heads": 16, "mlp_width": 4096, "pooler": True, **changes})

    @classmethod
    def roberta_base(cls, **changes: Any) -> BERTConfig:
        """RoBERTa-base: 124,645,632 parameters with the pooler."""
        own = {"vocab_size": 50265, "max_positions": 514, "token_types": 1, "pad_id": 1, "epsilon": 1e-5}
        return cls(**{**own, "mlm_activation": "gelu", "pooler": True, **changes})

    @classmethod
    def distilbert_base(cls, **changes: Any) -> BERTConfig:
        """DistilBERT-base, uncased: 66,362,880 parameters."""
        own = {"depth": 6, "token_types": 0, "attention_out_dropout": 0.0, "head_dropout": 0.2}
        return cls(**{**own, **changes})


class TextEmbeddings(nn.Module):
    """Word, position and token-type rows, added and normalised.

    Attributes:
      vocab_size, width, max_positions, token_types, epsilon: as in :class:`BERTConfig`.
      dtype, param_dtype: of computation and parameters.
    """

    vocab_size: int
    width: int
    max_positions: int
    token_types: int
    epsilon: float = 1e-12
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        """Makes the tables."""
        settings = {"features": self.width, "dtype": self.dtype, "param_dtype": self.param_dtype}
        self.word = Embed(self.vocab_size, **settings)
        self.position = Embed(self.max_positions, axes=(None, EMBED), **settings)
        if self.token_types:
            self.token_type = Embed(self.token_types, axes=(None, EMBED), **settings)
        self.norm = layer_norm(self.epsilon, self.dtype, self.param_dtype)

    def __call__(
        self,
        ids: Int[Array, "b t"] | None,
        embeddings: Float[Array, "b t d"] | None,
        positions: Int[Array, "#b t"],
        token_types: Int[Array, "b t"] | None,
    ) -> Float[Array, "b t d"]:
        """``[B, T, width]`` from word ids, or from what stands in their place."""
        x = self.word(ids) if embeddings is None else embeddings.astype(self.dtype)
        if self.token_types:
            x = x + self.token_type(jnp.zeros(x.shape[:2], jnp.int32) if token_types is None else token_types)
        return self.norm(x + self.position(positions))

    def table(self) -> Float[Array, "v d"]:
        """The word table ``[vocab_size, width]``."""
        return self.word.embedding


class BERTBlock(nn.Module):
    """Self-attention, cross-attention if configured, and a feed-forward layer, each followed by its norm.

    Attributes:
      config, dtype, param_dtype: see :class:`BERT`.
      probabilities: whether to return the cross-attention's.
    """

    config: BERTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    probabilities: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b 1 #t s"] | None,
        context: Float[Array, "b c e"] | None,
        context_mask: Bool[Array, "b 1 1 c"] | None,
        keys: Array | None,
        cache: Mapping[str, Array] | None = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
        """``[B, T, width] -> [B, T, width]``; masks tell which keys are real.

        Beside it ``probabilities`` (on request) and, with ``cache`` (this layer's, see :meth:`BERT.init_cache`),
        ``key`` and ``value`` with those of ``x`` written at ``index``.
        """
        config = self.config
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = lambda name: layer_norm(config.epsilon, self.dtype, self.param_dtype, name)  # noqa: E731
        out_rate = config.dropout if config.attention_out_dropout is None else config.attention_out_dropout
        attend = lambda name: MultiHeadAttention(  # noqa: E731
            config.num_heads, attention_dropout=config.attention_dropout, name=name, **settings
        )
        out: dict[str, Any] = {}
        if cache is None:
            y = attend("attention")(x, mask=mask, causal=config.causal, keys=layer_keys(keys, 0))
        else:
            own = cache["key"], cache["value"]
            y, found = attend("attention")(x, mask=mask, keys=layer_keys(keys, 0), cache=own, index=index)
            out["key"], out["value"] = found["cache"]
        x = norm("attention_norm")(x + dropout(y, out_rate, layer_keys(keys, 1)))
        read = (cache["context_key"], cache["context_value"]) if cache is not None and "context_key" in cache else None
        # without a context the block is a plain one, as in the reference library
        if config.cross_attention and (context is not None or read is not None):
            options = {"keys": layer_keys(keys, 2), "probabilities": self.probabilities, "cache": read}
            y = attend("cross_attention")(x, context, mask=context_mask, **options)
            if isinstance(y, tuple):
                y, found = y
                out |= {k: v for k, v in found.items() if k == "probabilities"}
            x = norm("cross_attention_norm")(x + dropout(y, out_rate, layer_keys(keys, 3)))
        y = ACTIVATIONS[config.activation](Dense(config.mlp_width, (EMBED, MLP), name="up", **settings)(x))
        y = Dense(config.width, (MLP, EMBED), name="down", **settings)(y)
        return norm("mlp_norm")(x + dropout(y, config.dropout, layer_keys(keys, 4))), out


class BERT(nn.Module):
    """A text encoder, or decoder, with the head that its configuration names.

    Attributes:
      config: see :class:`BERTConfig`.
      dtype, param_dtype: of computation and parameters.
      remat: whether blocks are recomputed in the backward pass instead of kept.
    """

    config: BERTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"] | None = None,
        padding_mask: Bool[Array, "b t"] | None = None,
        token_types: Int[Array, "b t"] | None = None,
        embeddings: Float[Array, "b t d"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        context: Float[Array, "b s e"] | None = None,
        context_padding_mask: Bool[Array, "b s"] | None = None,
        head_mask: Bool[Array, "b t"] | None = None,
        hidden_states: bool = False,
        train: bool = False,
        keys: Array | None = None,
        probabilities_of: int | None = None,
        cache: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Encodes texts.

        Args:
          ids: word ids ``[B, T]``.
          padding_mask: True where there is a real token.
          token_types: sentence of each token; 0 by default.
          embeddings: ``[B, T, width]`` in place of the word table's rows (positions, types and norm are still added).
          positions: rows of the position table; by default as ``config.pad_id`` says.  With ``embeddings`` there are no
            ids to tell padding by, and RoBERTa's positions count every token, as in the reference library.
          context: ``[B, S, width']`` that cross-attention reads; without it those layers are skipped.
          context_padding_mask: True where the context is real.
          head_mask: tokens that count in the dual encoder's mean and keep their ColBERT vector (without punctuation,
            say); by default ``padding_mask``.
          hidden_states: whether to return every block's input and the last one's output.
          train, keys: dropout is on if both are given; one key per example.
          probabilities_of: the block whose cross-attention probabilities to return; never all of them.
          cache: from :meth:`init_cache` or the call before: ``ids`` are the tokens that follow (all real), and the
            context is read from the cache.

        Returns:
          A dict: ``tokens [B, T, width]``; ``hidden_states`` (on request), ``depth + 1`` arrays like it; ``pooled
          [B, width]`` (pooler); ``next_sentence [B, 2]``; ``logits``: ``[B, T, vocab]`` (mlm) or ``[B, num_labels]``
          (classifier); ``scores [B]`` (cross); ``embedding [B, projection or width]`` (dual); ``vectors
          [B, T, projection]`` (colbert), zero at padding; ``probabilities [B, heads, T, S]`` (on request), which sum
          to 1 over the real context; ``cache``, advanced.

        Raises:
          ValueError: neither or both of ids and embeddings, a text longer than the position table, token types or a
            context for a model without them, probabilities of a block that has none, or a cache for an encoder.
        """
        config = self.config
        keys = keys if train else None
        if (ids is None) == (embeddings is None):
            raise ValueError("give either ids or embeddings, got " + ("neither" if ids is None else "both"))
        if token_types is not None and not config.token_types:
            raise ValueError("token_types given, but the model has none (config.token_types = 0): leave them out")
        if context is not None and not config.cross_attention:
            raise ValueError("context given, but the model does not read one: set config.cross_attention=True")
        if probabilities_of is not None and (context is None or not 0 <= probabilities_of < config.depth):
            raise ValueError(
                f"probabilities_of = {probabilities_of} needs a context and one of the {config.depth} blocks, from 0"
            )
        source = ids if embeddings is None else embeddings
        mask, context_mask, index = padding_to_mask(padding_mask), padding_to_mask(context_padding_mask), None
        if cache is not None:
            if not config.causal or config.pad_id is not None:
                raise ValueError("a cache is for a decoder (config.causal) that counts positions from 0 (pad_id None)")
            index, context_mask = cache["index"], padding_to_mask(cache["context_mask"])
            new = index + jnp.arange(source.shape[1])
            positions = new[None] if positions is None else positions
            seen = jnp.arange(cache["key"].shape[2]) <= new[:, None]
            mask = jnp.broadcast_to(seen, (source.shape[0], 1, *seen.shape))
        if positions is None:
            positions = self._positions(ids, source.shape[:2])
        table = TextEmbeddings(
            config.vocab_size, config.width, config.max_positions, config.token_types, config.epsilon, self.dtype,
            self.param_dtype, name="embeddings",
        )  # fmt: skip
        x = table(ids, embeddings, positions, token_types)
        x = dropout(x, config.dropout, layer_keys(keys, 0))
        states = [x]
        block = nn.remat(BERTBlock) if self.remat else BERTBlock
        out: dict[str, Any] = {}
        written: list[dict[str, Any]] = []
        for i in range(config.depth):
            layer = block(config, self.dtype, self.param_dtype, i == probabilities_of, name=f"layer{i}")
            own = None if cache is None else {k: v[i] for k, v in cache.items() if k.endswith(("key", "value"))}
            x, found = layer(x, mask, context, context_mask, layer_keys(keys, i + 1), own, index)
            if "probabilities" in found:
                out["probabilities"] = found["probabilities"]
            written.append(found)
            states.append(x)
        out["tokens"] = x
        if cache is not None:
            kept = {k: jnp.stack([layer[k] for layer in written]) for k in ("key", "value")}
            out["cache"] = {**cache, **kept, "index": index + source.shape[1]}
        if hidden_states:
            out["hidden_states"] = tuple(states)
        head_mask = padding_mask if head_mask is None else head_mask
        return out | self._heads(x, table, head_mask, layer_keys(keys, config.depth + 1))

    def _heads(self, x: Array, table: TextEmbeddings, mask: Array | None, keys: Array | None) -> dict[str, Array]:
        config, out = self.config, {}
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if config.pooler:
            out["pooled"] = jnp.tanh(Dense(config.width, (EMBED, None), name="pooler", **settings)(x[:, 0]))
        if config.next_sentence:
            # its weights are float32 and tiny: no reason to round the logits
            scorer = Dense(2, (EMBED, None), dtype=jnp.float32, param_dtype=self.param_dtype, name="next_sentence")
            out["next_sentence"] = scorer(out["pooled"].astype(jnp.float32))
        if config.head == "mlm":
            activation = config.mlm_activation or config.activation
            head = MaskedLMHead(config.vocab_size, activation, config.epsilon, config.tied, name="mlm", **settings)
            out["logits"] = head(x, table.table())
        if config.head in ("classifier", "cross"):
            features = config.num_labels if config.head == "classifier" else 1
            head = SentenceHead(
                features, config.head_activation, config.head_activation == "tanh", config.head_dropout,
                name="classifier", **settings,
            )  # fmt: skip
            logits = head(out["pooled"] if config.head_activation is None else x[:, 0], keys)
            out |= {"logits": logits} if config.head == "classifier" else {"scores": logits[:, 0]}
        if config.head == "dual":
            y = masked_mean(x, mask) if config.pooling == "mean" else x[:, 0].astype(jnp.float32)
            y = self._project(y, config.projection_bias) if config.projection else y
            out["embedding"] = l2_normalise(y) if config.normalise else y
        if config.head == "colbert":
            y = l2_normalise(self._project(x, False))
            out["vectors"] = y if mask is None else jnp.where(mask[..., None], y, 0.0)
        return out

    def _project(self, x: Array, use_bias: bool) -> Array:
        axes = (EMBED, HEADS)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        project = Dense(self.config.projection, axes, use_bias, name="projection", **settings)
        return project(x.astype(self.dtype)).astype(jnp.float32)

    def init_cache(
        self, params: Mapping[str, Any], context: Float[Array, "b s e"], mask: Bool[Array, "b s"] | None, length: int
    ) -> dict[str, Array]:
        """What a decoder keeps between calls: keys and values of up to ``length`` tokens, and those of the context.

        Args:
          params: this module's.
          context, mask: what cross-attention reads ``[B, S, width']`` and where it is real; projected once, here.
          length: the most tokens that will follow.

        Returns:
          ``key``, ``value [depth, B, length, heads, head_dim]``, ``context_key``, ``context_value`` (S in place of
          ``length``), ``context_mask [B, S]`` and ``index``, the number of tokens so far.

        Raises:
          ValueError: no cross-attention, or more tokens than positions.
        """
        config = self.config
        if not config.cross_attention:
            raise ValueError("the model does not read a context: set config.cross_attention=True")
        if length > config.max_positions:
            raise ValueError(f"a cache of {length} tokens, but there are positions for {config.max_positions}")
        heads = (*context.shape[:2], config.num_heads, config.width // config.num_heads)

        def project(name):
            found = []
            for i in range(config.depth):
                own = unbox(params)[f"layer{i}"]["cross_attention"][name]
                y = context.astype(self.dtype) @ own["kernel"].astype(self.dtype) + own["bias"].astype(self.dtype)
                found.append(y.reshape(heads))
            return jnp.stack(found)

        empty = jnp.zeros((config.depth, heads[0], length, *heads[2:]), self.dtype)
        real = jnp.ones(context.shape[:2], bool) if mask is None else mask
        return {
            "key": empty, "value": empty, "context_key": project("key"), "context_value": project("value"),
            "context_mask": real, "index": jnp.zeros((), jnp.int32),
        }  # fmt: skip

    def _positions(self, ids: Array | None, shape: tuple[int, int]) -> Array:
        pad, length = self.config.pad_id, shape[1]
        limit = self.config.max_positions - (0 if pad is None else pad + 1)
        if length > limit:
            raise ValueError(f"the texts have {length} tokens, but there are positions for {limit}: truncate them")
        if pad is None or ids is None:
            return jnp.arange(length)[None] + (0 if pad is None else pad + 1)
        real = (ids != pad).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + pad

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Keyword arguments that touch every parameter."""
        inputs = {"ids": jax.ShapeDtypeStruct((batch, 2), jnp.int32)}
        if self.config.cross_attention:
            inputs["context"] = jax.ShapeDtypeStruct((batch, 2, self.config.width), jnp.float32)
        return inputs
