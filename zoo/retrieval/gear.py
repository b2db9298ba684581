"""GeAR: generation augmented retrieval, a bi-encoder that can also say where the answer is, and what it is.

Liu, Huang, Liu, Zhan, Sun, Deng, Sun, Wei, Zhang: "GeAR: Generation Augmented Retrieval", Findings of ACL 2025,
arXiv 2501.02772.

A bi-encoder compresses the relation of a query and a document into one cosine and cannot tell *where* in the document
the answer lies.  GeAR keeps it for global retrieval and adds, after BLIP, a fusion encoder (the query encoder's own
layers, with one cross-attention to the document's token states in each) and a causal decoder that writes the answer
from the fused states.  A contrastive and a generation loss train everything jointly.  Searching costs what a bi-encoder
costs; the fusion encoder's attention ranks the sentences of the few documents retrieved; the decoder explains.

Shapes: ``B`` pairs, ``Lq`` and ``Ld`` tokens of query and document, ``Lt`` of the target text, ``h`` heads, ``S``
sentences of a document.  Masks are True at real tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.base import Loss, Objective, Shared, batch_mask, example_elements
from zoo.catalogue import Card, Claim
from zoo.losses.momentum import clamped_temperature, momentum_soft_contrastive, token_cross_entropy
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.dropout import layer_keys
from zoo.nn.partitioning import unbox
from zoo.nn.seq2seq import beam_search, greedy
from zoo.objectives import init_module
from zoo.ops.queues import enqueue, init_queue

# --- the model (paper, section 3; brief, Definition) ------------------------------------------------------------------


class GeAR(nn.Module):
    """Query encoder (also the fusion encoder), document encoder and decoder.

    Attributes:
      shape: size of the encoders; what it says of heads, causality and cross-attention is overruled here.
      text: size of the decoder; by default the encoders', with one word more.
      attention_block: block of the fusion encoder whose attention is shown; by default the 10th of 12, in proportion.
      initial_tau: the temperature at the start.
      dtype, param_dtype: of computation and parameters.
      remat: whether blocks are recomputed in the backward pass.
    """

    shape: BERTConfig
    text: BERTConfig | None = None
    attention_block: int | None = None
    initial_tau: float = 0.07
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        """Makes the three towers and the temperature."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype, "remat": self.remat}
        plain = {"causal": False, "pooler": False, "next_sentence": False, "normalise": True}
        tower = dataclasses.replace(self.shape, head="dual", pooling="mean", projection=None, **plain)
        self.query_encoder = BERT(dataclasses.replace(tower, cross_attention=True), **kinds)
        self.document_encoder = BERT(dataclasses.replace(tower, cross_attention=False), **kinds)
        self.decoder = BERT(self.decoder_config, **kinds)
        self.tau = self.param("tau", nn.initializers.constant(self.initial_tau), (), jnp.float32)

    @property
    def decoder_config(self) -> BERTConfig:
        """The decoder's configuration; its last word is [Decode]."""
        text = self.text or dataclasses.replace(self.shape, vocab_size=self.shape.vocab_size + 1)
        own = {"causal": True, "cross_attention": True, "head": "mlm", "tied": True}
        return dataclasses.replace(text, pooler=False, next_sentence=False, **own)

    @property
    def decode_id(self) -> int:
        """The [Decode] token with which every generated text begins."""
        return self.decoder_config.vocab_size - 1

    @property
    def shown_block(self) -> int:
        """The block of the fusion encoder whose attention localises, counted from 0."""
        if self.attention_block is not None:
            return self.attention_block
        return max(0, round(self.shape.depth * 10 / 12) - 1)

    def encode_query(
        self, ids: Int[Array, "b q"], mask: Bool[Array, "b q"], keys: Array | None = None
    ) -> dict[str, Array]:
        """E_q alone: ``tokens [B, Lq, H]`` and the unit ``embedding [B, H]`` (masked mean); no cross-attention."""
        return self.query_encoder(ids, mask, train=keys is not None, keys=keys)

    def encode_document(
        self, ids: Int[Array, "b d"], mask: Bool[Array, "b d"], keys: Array | None = None
    ) -> dict[str, Array]:
        """E_d: ``tokens [B, Ld, H]``, the states D that fusion reads, and the unit ``embedding [B, H]``."""
        return self.document_encoder(ids, mask, train=keys is not None, keys=keys)

    def fuse(
        self,
        ids: Int[Array, "b q"],
        mask: Bool[Array, "b q"],
        states: Float[Array, "b d h"],
        states_mask: Bool[Array, "b d"],
        keys: Array | None = None,
        show: bool = False,
    ) -> tuple[Float[Array, "b q h"], Float[Array, "b n q d"] | None]:
        """E_q's layers with cross-attention to the document's token states: F ``[B, Lq, H]``.

        With ``show`` also the cross-attention probabilities ``[B, h, Lq, Ld]`` of one block, which sum to 1 over the
        document's real tokens; never all blocks' (brief, Checks d).
        """
        shown = {"probabilities_of": self.shown_block} if show else {}
        found = self.query_encoder(
            ids, mask, context=states, context_padding_mask=states_mask, train=keys is not None, keys=keys, **shown
        )
        return found["tokens"], found.get("probabilities")

    def decode_logits(
        self,
        inputs: Int[Array, "b t"],
        fused: Float[Array, "b q h"],
        mask: Bool[Array, "b q"],
        keys: Array | None = None,
    ) -> Float[Array, "b t v"]:
        """Logits ``[B, Lt, V + 1]`` of each next token from the tokens up to it (:func:`shift_right`) and F."""
        train = keys is not None
        return self.decoder(inputs, context=fused, context_padding_mask=mask, train=train, keys=keys)["logits"]

    def decode_step(self, cache: Mapping[str, Array], ids: Int[Array, "b"]) -> tuple[Float[Array, "b v"], dict]:
        """Logits of the token after ``ids``, and the cache one token on."""
        found = self.decoder(ids[:, None], cache=cache)
        return found["logits"][:, 0], found["cache"]

    def start_cache(self, fused: Float[Array, "b q h"], mask: Bool[Array, "b q"], length: int) -> dict[str, Array]:
        """The decoder's cache before the first token: keys and values of F, and room for ``length`` tokens."""
        return self.decoder.init_cache(self.variables["params"]["decoder"], fused, mask, length)

    def __call__(self, query, query_mask, document, document_mask, target) -> Float[Array, "b t v"]:
        """Everything once, so that every parameter exists; the logits of the target."""
        self.encode_query(query, query_mask)
        states = self.encode_document(document, document_mask)["tokens"]
        fused, _ = self.fuse(query, query_mask, states, document_mask)
        return self.decode_logits(shift_right(target, self.decode_id), fused, query_mask)


def shift_right(target: Int[Array, "b t"], decode_id: int) -> Int[Array, "b t"]:
    """The decoder's inputs: [Decode], then the target without its last token."""
    first = jnp.full((target.shape[0], 1), decode_id, target.dtype)
    return jnp.concatenate([first, target[:, :-1]], axis=1)


# --- what is minimised: L = L_CL + alpha L_LM -------------------------------------------------------------------------


def gear(
    model: GeAR,
    alpha: float | int = 0.25,
    soft: float | int = 0.4,
    ramp_epochs: float | int = 1.0,
    momentum: float | int = 0.995,
    queue_size: int = 0,
    label_smoothing: float | int = 0.0,
    name: str = "gear",
) -> Objective:
    """Contrastive learning with a momentum bi-encoder's soft targets, plus ``alpha`` times the generation loss.

    Batches hold ``query``, ``document``, ``target`` (int32 ids ``[B, L]``; the target ends with its stop token),
    ``query_mask``, ``document_mask``, ``target_mask``, and ``document_id`` (int32: rows with equal ids are positives
    of each other).  Elements are examples: ``L_CL + alpha * L_LM`` of each.  Collections beside the parameters:
    ``teacher``, the momentum encoders, and ``memory``, the queue.  Fusion and decoder run on the B positive pairs only.

    Args:
      model: see :class:`GeAR`.
      alpha: weight of the generation loss; 0 trains the bi-encoder alone.
      soft: ``a``, the momentum model's share of the targets, after a linear ramp over ``ramp_epochs``.
      ramp_epochs: 0 for no ramp.
      momentum: m; after each step ``teacher = m teacher + (1 - m) params``.
      queue_size: earlier momentum embeddings kept as further keys (a multiple of the global batch); 0 for none.
      label_smoothing: of the generation loss.

    Raises:
      ValueError: a setting outside its range.
    """
    check_settings(alpha, soft, momentum, model.initial_tau)
    if queue_size < 0 or ramp_epochs < 0:
        raise ValueError(f"queue_size and ramp_epochs must not be negative, got {queue_size} and {ramp_epochs}")

    def init(rng, batch):
        columns = ("query", "query_mask", "document", "document_mask", "target")
        variables = init_module(model, rng, batch, *(batch[c] for c in columns))
        variables["teacher"] = jax.tree.map(jnp.copy, bi_encoder(variables["params"]))
        if queue_size:
            row = jnp.zeros((1, model.shape.width), jnp.float32)
            like = {"a": row, "b": row, "id": jnp.zeros(1, jnp.int32)}
            variables["memory"] = init_queue(queue_size, like)
        return variables

    def forward(variables, batch, context):
        params, teacher = variables["params"], jax.lax.stop_gradient(variables["teacher"])
        run = lambda method, *args, p=params, **rest: model.apply({"params": p}, *args, method=method, **rest)  # noqa: E731
        keys = context.example_keys(batch, "dropout") if context.train else None
        drop = lambda part: layer_keys(keys, part)  # noqa: E731
        query, document = (batch["query"], batch["query_mask"]), (batch["document"], batch["document_mask"])
        q, d = run("encode_query", *query, keys=drop(0)), run("encode_document", *document, keys=drop(1))
        fused, _ = run("fuse", *query, d["tokens"], document[1], keys=drop(2))
        logits = run("decode_logits", shift_right(batch["target"], model.decode_id), fused, query[1], keys=drop(3))
        # the momentum encoders answer without dropout
        kept = {**teacher, "tau": params["tau"]}
        taught = [run(m, *x, p=kept) for m, x in (("encode_query", query), ("encode_document", document))]
        return {
            "query": q["embedding"],
            "document": d["embedding"],
            "query_momentum": jax.lax.stop_gradient(taught[0]["embedding"]),
            "document_momentum": jax.lax.stop_gradient(taught[1]["embedding"]),
            "lm": token_cross_entropy(logits, batch["target"], batch["target_mask"], label_smoothing),
            "embedding": q["embedding"],
            "tau": Shared(clamped_temperature(jnp.asarray(params["tau"], jnp.float32))),
        }, {}

    def loss(outputs, batch, context):
        mask, tau = batch_mask(batch), outputs["tau"].value
        share = jnp.asarray(soft, jnp.float32)
        if ramp_epochs:
            share = share * jnp.clip(context.step / (ramp_epochs * context.steps_per_epoch), 0.0, 1.0)
        contrastive = momentum_soft_contrastive(
            outputs["query"], outputs["document"], outputs["query_momentum"], outputs["document_momentum"], tau, share,
            batch["document_id"], mask, context.collections["memory"] if queue_size else None,
        )  # fmt: skip
        mean = lambda x: jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)  # noqa: E731
        metrics = {"contrastive": mean(contrastive), "lm": mean(outputs["lm"]), "tau": tau, "soft": share}
        return Loss(example_elements(contrastive + alpha * outputs["lm"], batch), metrics=metrics)

    def after_step(variables, outputs, batch, context):
        changed = {"teacher": ema_update(variables["teacher"], bi_encoder(variables["params"]), momentum)}
        if queue_size:
            rows = {"a": outputs["query_momentum"], "b": outputs["document_momentum"], "id": batch["document_id"]}
            changed["memory"] = enqueue(variables["memory"], rows, batch_mask(batch))
        return changed

    return Objective(
        init,
        forward,
        loss,
        provides=("embedding", "index"),
        after_step=after_step,
        gathers=("document_id",),
        name=name,
    )


def bi_encoder(params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of GeAR's parameters that retrieval needs: both encoders, without cross-attention."""
    layers = {
        layer: {k: v for k, v in part.items() if not k.startswith("cross_attention")} if "layer" in layer else part
        for layer, part in params["query_encoder"].items()
    }
    return {"query_encoder": layers, "document_encoder": params["document_encoder"]}


def ema_update(target: Any, params: Any, momentum: float | int) -> Any:
    """``momentum * target + (1 - momentum) * params``, leaf by leaf; 1 keeps the target, 0 copies the parameters."""
    return jax.tree.map(lambda t, p: momentum * t + (1.0 - momentum) * p, target, params)


def check_settings(alpha: float | int, soft: float | int, momentum: float | int, tau: float | int) -> None:
    """Raises ValueError for a setting outside its range, naming it."""
    if not alpha >= 0:
        raise ValueError(f"alpha must not be negative, got {alpha}")
    if not 0 <= soft <= 1:
        raise ValueError(f"soft must lie in [0, 1], got {soft}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}; the published start is 0.07")


# --- local retrieval and generation (paper, section 3.4; brief, Inference tasks) --------------------------------------


def attention_localize(
    probabilities: Float[Array, "b h q d"],
    query_mask: Bool[Array, "b q"],
    document_mask: Bool[Array, "b d"],
    sentence_ids: Int[Array, "b d"],
    sentences: int,
    reduce: str = "mean",
) -> Float[Array, "b s"]:
    """Sentence scores from cross-attention: averaged over heads and query tokens, then over a sentence's tokens.

    Args:
      probabilities: of one block of the fusion encoder.
      query_mask, document_mask: which tokens count; leave out [CLS], [SEP] and whatever else draws attention for
        nothing, not only padding.
      sentence_ids: the sentence of each document token; outside ``0 .. S - 1`` for none.
      sentences: S, static.
      reduce: over a sentence's tokens: their ``"mean"`` or ``"sum"``.

    Returns:
      f32 ``[B, S]``; ``-inf`` for a sentence without counted tokens.

    Raises:
      ValueError: another ``reduce``.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}")
    weight = jnp.mean(probabilities.astype(jnp.float32), axis=1)
    asked = jnp.sum(jnp.where(query_mask[..., None], weight, 0.0), axis=1)
    asked = asked / jnp.maximum(jnp.sum(query_mask, axis=1, keepdims=True), 1)
    inside = document_mask & (sentence_ids >= 0) & (sentence_ids < sentences)
    rows = jnp.arange(sentence_ids.shape[0])[:, None]
    slot = jnp.where(inside, rows * sentences + sentence_ids, rows.shape[0] * sentences)
    add = lambda x: jax.ops.segment_sum(x.ravel(), slot.ravel(), rows.shape[0] * sentences + 1)[:-1]  # noqa: E731
    total, count = (add(x).reshape(-1, sentences) for x in (asked, inside.astype(jnp.float32)))
    score = total / jnp.maximum(count, 1) if reduce == "mean" else total
    return jnp.where(count > 0, score, -jnp.inf)


def localize(
    model: GeAR,
    variables: Mapping[str, Any],
    query: Int[Array, "b q"],
    query_mask: Bool[Array, "b q"],
    states: Float[Array, "b d h"],
    document_mask: Bool[Array, "b d"],
    sentence_ids: Int[Array, "b d"],
    sentences: int,
    inner_mask: Bool[Array, "b q"] | None = None,
    reduce: str = "mean",
) -> tuple[Float[Array, "b s"], Float[Array, "b q h"]]:
    """Sentence scores ``[B, S]`` of query-document pairs, and F for the decoder, in one pass of the fusion encoder.

    Args:
      model, variables: a GeAR.
      query, query_mask: ids and which are real.
      states, document_mask: D, fresh or cached, and which tokens are real.
      sentence_ids, sentences, reduce: see :func:`attention_localize`.
      inner_mask: query tokens that count; by default all but the first and the last real one ([CLS] and [SEP]), if
        there are any between.
    """
    fused, shown = model.apply(
        {"params": variables["params"]}, query, query_mask, states, document_mask, show=True, method="fuse"
    )
    counted = without_ends(query_mask) if inner_mask is None else inner_mask
    return attention_localize(shown, counted, document_mask, sentence_ids, sentences, reduce), fused


def without_ends(mask: Bool[Array, "b t"]) -> Bool[Array, "b t"]:
    """The mask without its first and last real token; unchanged in rows that have no more than these two."""
    place = jnp.cumsum(mask, axis=1)
    count = place[:, -1:]
    return mask & ((count <= 2) | ((place > 1) & (place < count)))


def generate(
    model: GeAR,
    variables: Mapping[str, Any],
    fused: Float[Array, "b q h"],
    query_mask: Bool[Array, "b q"],
    length: int,
    stop: int,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> Int[Array, "b {length}"]:
    """The text that the decoder makes of F, from [Decode] to the stop token: greedy, or the best of some beams.

    Keys and values of F are computed once, those of the tokens kept; the loop ends when every row has stopped.

    Args:
      model, variables: a GeAR.
      fused, query_mask: F and which query tokens are real.
      length: the most new tokens (the paper's limit is not given; 64 here).
      stop: the token that ends a text; rows repeat it to the end.
      beams: continuations kept; 1 is greedy.
      length_penalty: see ``zoo.nn.seq2seq.beam_search``.

    Raises:
      ValueError: more tokens than the decoder has positions, or a length or beams below 1.
    """
    weights = {"params": unbox(variables["params"])}
    if beams > 1:
        fused, query_mask = (jnp.repeat(x, beams, axis=0) for x in (fused, query_mask))
    cache = model.apply(weights, fused, query_mask, length, method="start_cache")
    start = jnp.full(fused.shape[0] // max(beams, 1), model.decode_id, jnp.int32)
    step = lambda cache, ids: model.apply(weights, cache, ids, method="decode_step")  # noqa: E731
    if beams == 1:
        return greedy(step, cache, start, length, stop)
    # beams of one example share its context, so only what they have written moves
    move = lambda cache, rows: {**cache, **{k: cache[k][:, rows] for k in ("key", "value")}}  # noqa: E731
    return beam_search(step, cache, start, length, stop, beams, move, length_penalty)[0]


CARD = Card(
    name="gear",
    family="retrieval",
    title="GeAR: Generation Augmented Retrieval",
    year=2025,
    kind="objective",
    idea=(
        "A bi-encoder's cosine finds a document but not the place in it. GeAR lets the query encoder's own layers, "
        "with one cross-attention each, read the document's token states, and a decoder write the answer from what "
        "they hold. Trained jointly with the contrastive loss, the cross-attention learns where answers are, while "
        "search still costs what a bi-encoder costs."
    ),
    citation="Liu, Huang, Liu, Zhan, Sun, Deng, Sun, Wei, Zhang; Findings of ACL 2025; arXiv 2501.02772",
    plugs_into=(
        "any bi-encoder with token states",
        "inner-product search",
        "loss transformations on examples",
        "momentum encoders and queues",
    ),
    pieces=(
        "GeAR",
        "gear",
        "shift_right",
        "attention_localize",
        "localize",
        "generate",
        "bi_encoder",
        "ema_update",
        "without_ends",
        "check_settings",
        "zoo.losses.momentum:momentum_soft_contrastive",
        "zoo.losses.momentum:token_cross_entropy",
        "zoo.losses.momentum:clamped_temperature",
        "zoo.ops.queues:init_queue",
        "zoo.ops.queues:enqueue",
        "zoo.nn.seq2seq:greedy",
        "zoo.nn.seq2seq:beam_search",
        "zoo.metrics.text:text_metrics",
    ),
    claim=Claim(
        statement=(
            "On documents of six key-value sentences, training with the generation loss (alpha 0.25) makes the fusion "
            "encoder's attention rank the asked sentence first more often than training without it (alpha 0), at "
            "equal steps."
        ),
        metric="local_recall_1",
        effect=0.3,
        method="alpha 0.25",
        baseline="alpha 0",
        trivial="random sentence",
        seeds=5,
        budget="the same documents, first weights, order and steps; no tuning in any arm",
    ),
    cost="fusion O(Lq Ld H) per pair, on positives only; a search costs what a bi-encoder's costs",
    official_code="announced in microsoft/LMOps, not there; momentum part after salesforce/ALBEF",
    departures=(
        "momentum encoders answer without dropout; ALBEF leaves theirs in training mode",
        "the temperature is clipped in the forward pass with its gradient let through; ALBEF clips the parameter",
        "rows with equal document ids are positives of each other, as in BLIP's retrieval fine-tuning",
        "cross-attention starts from Xavier's initialisation, as the backbone's other kernels, not N(0, 0.02)",
        "beam search keeps finished beams in place; the paper does not say",
    ),
)
