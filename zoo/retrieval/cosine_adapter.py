"""The Cosine Adapter: relevance filtering for embedding-based retrieval.

Rossi, Lin, Liu, Yang, Lee, Magnani, Liao: "Relevance Filtering for Embedding-based Retrieval", CIKM 2024,
arXiv 2408.04887, doi 10.1145/3627673.3680095.

Dense retrieval returns K neighbours for every query, relevant or not.  Cosines order the items of one query but mean
different things to different queries, so that no global cutoff filters well.  A small network reads the *query
embedding* once and predicts the parameters of a monotone scalar function; applied to each cosine it gives a relevance
logit on which one global threshold works.  Encoders stay frozen, and the order of a query's items never changes.

The mapping families, the input, the loss and the freezing are the paper's.  Widths, initialisation and the optimiser
are not published; here ``a = softplus``, ``k = 2 sigmoid`` (in (0, 2)), and the start is ``10 (x - mean cosine)``.
No official code exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, PyTree

from zoo.base import Batch, Context, Loss, Objective, batch_mask, elements
from zoo.catalogue import Card, Claim
from zoo.losses.retrieval import masked_bce
from zoo.metrics.binary import average_precision, check_binary, filter_mask, select_threshold
from zoo.ops.fingerprint import fingerprint
from zoo.ops.prototypes import l2_normalize

__all__ = [
    "MAPPINGS", "CosineAdapter", "RelevanceFilter", "adapt", "adapter_objective", "apply_filter", "average_precision",
    "check_adapter", "check_candidates", "check_filter", "filter_mask", "fit_filter", "masked_bce", "score_map",
    "score_map_linear", "score_map_power", "score_map_quadratic", "score_map_raw", "score_map_sqrt", "select_threshold",
]  # fmt: skip

SMALLEST = 1e-6
"""Cosines nearer to 0 follow a straight line to it, so that no derivative of a power is infinite."""

# --- the families of monotone maps (paper, table of transformations) --------------------------------------------------


def score_map_raw(theta: Float[Array, "*b 0"], x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """``F(x) = x``: no parameter, the baseline."""
    return x


def score_map_linear(theta: Float[Array, "*b 2"], x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """``F(x) = a x + b`` with ``theta = (a, b)``."""
    return theta[..., 0] * x + theta[..., 1]


def score_map_sqrt(theta: Float[Array, "*b 2"], x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """``F(x) = sgn(x) a sqrt|x| + b``."""
    return theta[..., 0] * _signed_power(x, 0.5) + theta[..., 1]


def score_map_quadratic(theta: Float[Array, "*b 2"], x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """``F(x) = sgn(x) a x^2 + b``."""
    return theta[..., 0] * x * jnp.abs(x) + theta[..., 1]


def score_map_power(theta: Float[Array, "*b 3"], x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """``F(x) = sgn(x) a |x|^k + b`` with ``theta = (a, b, k)``, k in (0, 2)."""
    return theta[..., 0] * _signed_power(x, theta[..., 2]) + theta[..., 1]


def _signed_power(x: Array, k: Any) -> Array:
    # exact from SMALLEST on; below it x / SMALLEST of the power there: continuous, monotone, odd, finite derivatives
    size = jnp.maximum(jnp.abs(x), SMALLEST)
    return jnp.where(jnp.abs(x) >= SMALLEST, jnp.sign(x), x / SMALLEST) * jnp.exp(k * jnp.log(size))


MAPPINGS: Mapping[str, tuple[Callable, int]] = {
    "raw": (score_map_raw, 0),
    "linear": (score_map_linear, 2),
    "sqrt": (score_map_sqrt, 2),
    "quadratic": (score_map_quadratic, 2),
    "power": (score_map_power, 3),
}
"""Name of a family to its map and the number of its parameters."""


def score_map(mapping: str, theta: Float[Array, "b p"], x: Float[Array, "b k"]) -> Float[Array, "b k"]:
    """Applies a family by name to a list per query, each with its query's parameters.

    Raises:
      ValueError: an unknown name; lists the five.
    """
    function, _ = _mapping(mapping)
    x = x.astype(jnp.float32)
    return function(jnp.broadcast_to(theta[:, None], (*x.shape, theta.shape[-1])), x)


def _mapping(name: str) -> tuple[Callable, int]:
    if name not in MAPPINGS:
        raise ValueError(f"mapping must be one of {', '.join(MAPPINGS)}; got {name!r}")
    return MAPPINGS[name]


# --- the adapter (paper, Cosine Adapter) ------------------------------------------------------------------------------


class CosineAdapter(nn.Module):
    """From a query embedding to the parameters of its score map, and through it from cosines to relevance logits.

    Attributes:
      mapping: a key of ``MAPPINGS``.
      hidden_dims: widths of the hidden layers; the paper's cost is that of one as wide as the embedding.
      positive_slope: ``a = softplus``, which makes every map monotone; without it ``a`` is free.
      slope: a at the start.
      mean_cosine: of the training pairs; ``b = -slope * mean_cosine`` at the start.
      dtype: of the hidden layers; parameters of the map and logits are float32.
    """

    mapping: str = "power"
    hidden_dims: tuple[int, ...] = (64,)
    positive_slope: bool = True
    slope: float = 10.0
    mean_cosine: float = 0.5
    dtype: Any = jnp.float32

    def setup(self):
        _, count = _mapping(self.mapping)
        self.hidden = [nn.Dense(width, dtype=self.dtype) for width in self.hidden_dims]
        if count:
            first = np.log(np.expm1(self.slope)) if self.positive_slope else self.slope
            start = [first, -self.slope * self.mean_cosine, 0.0][:count]
            bias = lambda key, shape, dtype=jnp.float32: jnp.asarray(start, dtype)  # noqa: E731
            kernel = nn.initializers.normal(0.01)
            self.out = nn.Dense(count, dtype=self.dtype, kernel_init=kernel, bias_init=bias)

    def theta(self, query_emb: Float[Array, "b d"]) -> Float[Array, "b p"]:
        """Parameters ``(a, b)`` or ``(a, b, k)`` of each query's map, f32; embeddings are scaled to unit length."""
        _, count = _mapping(self.mapping)
        if not count:
            return jnp.zeros((query_emb.shape[0], 0), jnp.float32)
        h = l2_normalize(query_emb.astype(jnp.float32)).astype(self.dtype)
        for layer in self.hidden:
            h = nn.relu(layer(h))
        raw = self.out(h).astype(jnp.float32)
        parts = [jax.nn.softplus(raw[:, 0]) if self.positive_slope else raw[:, 0], raw[:, 1]]
        if count == 3:
            parts.append(2.0 * jax.nn.sigmoid(raw[:, 2]))
        return jnp.stack(parts, -1)

    def __call__(
        self, query_emb: Float[Array, "b d"], cos: Float[Array, "b k"], mask: Bool[Array, "b k"] | None = None
    ) -> Float[Array, "b k"]:
        """Relevance logits f32; 0 where ``mask`` is false, whatever the cosine there is."""
        mask = jnp.ones(cos.shape, bool) if mask is None else mask
        # before the map, so that padding that is not finite has a zero gradient
        x = jnp.where(mask, cos.astype(jnp.float32), 0.0)
        return jnp.where(mask, score_map(self.mapping, self.theta(query_emb), x), 0.0)


def adapt(
    module: CosineAdapter,
    params: PyTree,
    query_emb: Float[Array, "b d"],
    cos: Float[Array, "b k"],
    mask: Bool[Array, "b k"] | None = None,
) -> Float[Array, "b k"]:
    """``module`` with its trained ``params``: one pass of the network a query, O(1) more for each candidate."""
    return module.apply({"params": params}, query_emb, cos, mask)


# --- training (paper, loss) -------------------------------------------------------------------------------------------


def adapter_objective(
    module: CosineAdapter,
    positive_weight: float = 1.0,
    encode: Callable[[PyTree, Batch], tuple[Array, Array]] | None = None,
    encoder: PyTree = None,
) -> Objective:
    """Binary cross-entropy of the logits of all real (query, candidate) pairs; one element a pair.

    Args:
      module: the adapter.
      positive_weight: factor of the positive term; 1 keeps logits calibrated.
      encode, encoder: to run the frozen encoders inside: ``(encoder, batch) -> (query_emb [B, d], cos [B, K])`` and
        their parameters, kept in ``constants``.  Without them the batch holds both.

    The batch has ``query`` f32 ``[B, d]`` and ``cos`` f32 ``[B, K]`` (or what ``encode`` reads), ``label`` ``[B, K]``
    in [0, 1] (graded labels enter the formula as they are) and ``real`` bool ``[B, K]``.  Gradients reach the adapter
    only.
    """
    if not positive_weight > 0:
        raise ValueError(f"positive_weight must be positive, got {positive_weight}")

    def inputs(variables, batch):
        if encode is None:
            pair = batch["query"], batch["cos"]
        else:
            pair = encode(variables["constants"]["encoder"], batch)
        return jax.lax.stop_gradient(pair)

    def init(rng, batch):
        constants = {} if encode is None else {"constants": {"encoder": encoder}}
        query, cos = inputs(constants, batch)
        return {"params": module.init(rng, query, cos).get("params", {}), **constants}

    def forward(variables, batch, context: Context):
        query, cos = inputs(variables, batch)
        return {"logits": adapt(module, variables["params"], query, cos, batch["real"])}, {}

    def loss(outputs, batch, context: Context) -> Loss:
        logits = outputs["logits"]
        rows, width = logits.shape
        real = batch["real"] & batch_mask(batch)[:, None]
        values = masked_bce(logits, batch["label"].astype(jnp.float32), real, positive_weight)
        places = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(width), indexing="ij"), -1).astype(jnp.int32)
        kept = elements(values.ravel(), places.reshape(-1, 2), real.ravel(), "token")
        count = jnp.maximum(jnp.sum(real), 1)
        agree = jnp.sum(real & ((logits > 0) == (batch["label"] > 0.5))) / count
        return Loss(kept, metrics={"accuracy": agree})

    gathers = ("label", "real")
    return Objective(init, forward, loss, "token", ("logits", "label", "real"), gathers=gathers, name="cosine_adapter")


# --- one threshold for all queries (paper, threshold selection and inference) -----------------------------------------


@struct.dataclass
class RelevanceFilter:
    """A threshold and what it belongs to.

    Attributes:
      threshold: f32 ``[]``; pairs with a logit of at least it survive.
      fingerprint: uint32 ``[2]`` of the adapter's parameters.
    """

    threshold: Any
    fingerprint: Any


def fit_filter(
    module: CosineAdapter,
    params: PyTree,
    query_emb: Float[Array, "b d"],
    cos: Float[Array, "b k"],
    labels: Float[Array, "b k"],
    mask: Bool[Array, "b k"] | None = None,
    target_recall: float | Float[Array, ""] = 0.95,
) -> RelevanceFilter:
    """The largest threshold whose pooled recall, among the retrieved, reaches the target on a validation set."""
    scores = adapt(module, params, query_emb, cos, mask)
    return RelevanceFilter(select_threshold(scores, labels, mask, target_recall), fingerprint(params))


def apply_filter(
    fitted: RelevanceFilter,
    module: CosineAdapter,
    params: PyTree,
    query_emb: Float[Array, "b d"],
    cos: Float[Array, "b k"],
    mask: Bool[Array, "b k"] | None = None,
) -> Bool[Array, "b k"]:
    """Which candidates survive; what :func:`check_filter` refuses is not seen here (it runs on the host)."""
    return filter_mask(adapt(module, params, query_emb, cos, mask), fitted.threshold, mask)


def check_filter(fitted: RelevanceFilter, params: PyTree) -> None:
    """Raises ValueError unless the threshold was chosen for these parameters (on the host)."""
    if not np.array_equal(np.asarray(fitted.fingerprint), np.asarray(fingerprint(params))):
        raise ValueError("the threshold was chosen for another adapter's logits: fit the filter again")


def check_adapter(params: PyTree, query_emb: Any) -> None:
    """Raises ValueError unless the adapter reads embeddings of this dimension."""
    first = params.get("hidden_0", params.get("out")) if params else None
    if first is not None and first["kernel"].shape[0] != np.shape(query_emb)[1]:
        reads, given = first["kernel"].shape[0], np.shape(query_emb)[1]
        raise ValueError(f"the adapter reads embeddings of {reads} dimensions, these have {given}")


def check_candidates(
    query_emb: Any, cos: Any, labels: Any = None, mask: Any = None, target_recall: float | None = None
) -> None:
    """Refuses, on the host, candidates that cannot be learned from, or that no threshold can be chosen on.

    Args:
      query_emb, cos, labels, mask: ``[N, d]``, ``[N, K]``, ``[N, K]`` in [0, 1] and bool ``[N, K]``.
      target_recall: if given, exactly 0 and 1 among the labels are asked for, and a recall in (0, 1] that they allow.

    Raises:
      ValueError: one line that names what is wrong.
    """
    query_emb, cos = np.asarray(query_emb), np.asarray(cos)
    mask = np.ones(cos.shape, bool) if mask is None else np.asarray(mask, bool)
    if cos.ndim != 2 or len(query_emb) != len(cos):
        raise ValueError(f"need cosines [N, K] of N queries; got {cos.shape} and {len(query_emb)} embeddings")
    named = {"mask": mask} if labels is None else {"mask": mask, "labels": np.asarray(labels)}
    for name, x in named.items():
        if x.shape != cos.shape:
            raise ValueError(f"{name} {x.shape} and cosines {cos.shape} must have one shape [N, K]")
    if not mask.any(1).all():
        row = int(np.flatnonzero(~mask.any(1))[0])
        raise ValueError(f"query {row} has no candidate: every place of its row is masked")
    if not np.isfinite(query_emb).all() or not np.isfinite(cos[mask]).all():
        raise ValueError("embeddings and cosines must be finite")
    extreme = cos[mask][np.argmax(np.abs(cos[mask]))]
    if abs(extreme) > 1 + 1e-4:
        kind = "max" if extreme > 0 else "min"
        raise ValueError(f"cosine adapter expects cosine similarities; got {kind} {extreme:.4g}: normalise embeddings")
    if labels is None:
        return
    real = named["labels"][mask]
    if not ((real >= 0) & (real <= 1)).all():
        raise ValueError(f"labels must lie in [0, 1]; they run from {real.min():g} to {real.max():g}")
    if target_recall is not None:
        if not 0 < target_recall <= 1:
            raise ValueError(f"target recall must be in (0, 1], got {target_recall}")
        try:
            check_binary(cos, named["labels"], mask)
        except ValueError as error:
            raise ValueError(f"no threshold has recall {target_recall:g}: {error}") from None


def identical(first: PyTree, second: PyTree) -> bool:
    """Whether two trees hold the same bits: frozen encoders before and after training."""
    return bool(np.array_equal(np.asarray(fingerprint(first)), np.asarray(fingerprint(second))))


def global_map(params: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter with its last kernel at 0: one map for all queries, whose PR AUC is exactly that of raw cosines."""
    out = {**params["out"], "kernel": jnp.zeros_like(params["out"]["kernel"])}
    return {**params, "out": out}


def to_arrays(fitted: RelevanceFilter) -> dict[str, Any]:
    """A filter's arrays, for checkpoints; ``RelevanceFilter(**arrays)`` undoes it."""
    return {field.name: getattr(fitted, field.name) for field in dataclasses.fields(fitted)}


CARD = Card(
    name="cosine_adapter",
    family="retrieval",
    title="Relevance Filtering for Embedding-based Retrieval",
    year=2024,
    kind="objective",
    idea=(
        "Cosines order one query's candidates but are not comparable between queries. A small network reads the query "
        "embedding and predicts a monotone scalar map; the mapped cosines are relevance logits on which one global "
        "threshold filters retrieved lists. The dual encoder stays frozen and no order within a query changes."
    ),
    citation="Rossi, Lin, Liu, Yang, Lee, Magnani, Liao; CIKM 2024, arXiv 2408.04887",
    plugs_into=(
        "any retriever's candidates and cosines, before a re-ranker",
        "loss transformations on (query, candidate) pairs (unit token)",
        "zoo.metrics.binary for thresholds and PR AUC",
    ),
    pieces=(
        "CosineAdapter", "adapter_objective", "adapt", "score_map", "score_map_linear", "score_map_sqrt",
        "score_map_quadratic", "score_map_power", "fit_filter", "apply_filter", "check_candidates",
        "zoo.losses.retrieval:masked_bce", "zoo.metrics.binary:select_threshold",
        "zoo.metrics.binary:average_precision", "zoo.metrics.binary:precision_at_recall",
        "zoo.metrics.binary:filter_rate", "zoo.metrics.binary:null_rate",
    ),
    claim=Claim(
        statement=(
            "Pooled over all pairs of test queries, relevance logits of the Cosine Adapter (linear map) have a higher "
            "PR AUC than raw cosines, on generated queries whose embedding decides how their cosines are to be read"
        ),
        metric="pr_auc",
        effect=0.08,
        method="cosine adapter (linear)",
        baseline="raw cosine",
        trivial="random scores",
        budget="the same queries and candidates; 400 full-batch Adam steps at 1e-2 for the adapter; nothing tuned",
    ),
    cost="O(d^2) a query, O(1) more a candidate; nothing of size queries x candidates x d",
    official_code="none found",
    departures=(
        "Hidden widths, initialisation and optimiser are not published: softplus slope, k = 2 sigmoid, a global start.",
        "Near 0 the powers continue as a straight line (below 1e-6), so that no derivative is infinite.",
    ),
)  # fmt: skip
