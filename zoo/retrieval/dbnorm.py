"""DBNorm: mitigating hubness in cross-modal retrieval with a query bank and a gallery bank.

Wang, Jian, Xue: "Balance Act: Mitigating Hubness in Cross-Modal Retrieval with Query and Gallery Banks", EMNLP 2023,
arXiv 2310.11612; after Bogolin, Croitoru, Jin, Liu, Albanie: "Cross Modal Retrieval with Querybank Normalisation"
(QB-Norm), CVPR 2022, arXiv 2112.12777.

In a joint embedding space a few gallery items (hubs) are near neighbours of very many queries and crowd the right
answers out.  Nothing is trained: each gallery item's similarity is rescaled by how strongly the item answers a *bank*
of other samples.  QB-Norm's bank holds training queries; hubs are also close to gallery data, so DBNorm multiplies two
such factors, one from a bank of queries and one from a bank of gallery items.

With similarities S ``[N_q, N_g]`` and bank responses T ``[M, N_g]`` all of it is one shift per gallery item in log
space, ``beta S_ij - lse_b(beta T_bj)``: a state of N_g numbers, computed once, streamed over the bank, and folded into
inner-product search by one appended coordinate.  Scores here are logarithms, so nothing over- or underflows.

The opposite direction is the same functions on ``S.T`` with the banks' parts exchanged.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, PyTree

from zoo.catalogue import Card, Claim
from zoo.metrics.hubness import hubness_skewness, k_occurrence
from zoo.ops.banks import (
    activated,
    bank_activation,
    bank_log_normalizer,
    bank_neighbourhood,
    bank_sinkhorn,
    products,
    sharded_bank_log_normalizer,
)
from zoo.ops.blocks import in_blocks
from zoo.ops.fingerprint import fingerprint
from zoo.ops.search import Found, mips_topk
from zoo.ops.sinkhorn import sinkhorn_columns, sinkhorn_normalize
from zoo.ops.topk import top_k

__all__ = [
    "MODES", "STATIC_MODES", "HubnessCalibrator", "apply", "bank_activation", "bank_log_normalizer",
    "bank_neighbourhood", "bank_sinkhorn", "CalibratorConfig", "calibrated_topk", "calibrator_from_arrays",
    "check_exponent", "check_gallery",
    "check_settings", "check_similarities", "check_vectors", "csls", "dynamic_gate", "fit", "fold_gallery",
    "fold_queries", "from_similarities", "hubness_skewness", "inverted_softmax", "k_occurrence",
    "sharded_bank_log_normalizer", "sinkhorn_normalize", "to_arrays",
]  # fmt: skip

STATIC_MODES = ("identity", "is", "dualis", "csls", "sinkhorn")
MODES = (*STATIC_MODES, "dis", "dualdis", "gc")
Scalar = float | int | Float[Array, ""]

# --- how a gallery item answers a bank (brief, Definition) ------------------------------------------------------------


def inverted_softmax(
    similarities: Float[Array, "q n"], log_norm: Float[Array, "n"], beta: Scalar
) -> Float[Array, "q n"]:
    """IS in log space: ``beta S_ij - lse_b(beta T_bj)``, a shift per gallery item."""
    return beta * similarities.astype(jnp.float32) - log_norm


def csls(similarities: Float[Array, "q n"], neighbourhood: Float[Array, "n"], k: int = 10) -> Float[Array, "q n"]:
    """Cross-domain similarity local scaling: ``2 S_ij - r_j - r_i`` (Conneau et al., ICLR 2018).

    ``r_i`` is the mean of the query's k largest similarities (all, if there are fewer): it changes no ranking of a row,
    only the comparison between queries.
    """
    s = similarities.astype(jnp.float32)
    own = jnp.mean(top_k(s, min(k, s.shape[1]))[0], -1, keepdims=True)
    return 2.0 * s - neighbourhood - own


def dynamic_gate(similarities: Float[Array, "q n"], active: Bool[Array, "n"]) -> Bool[Array, "q"]:
    """Which queries are normalised: those whose best raw match (ties: the first) is in the activation set."""
    return active[jnp.argmax(similarities, -1)]


# --- fit once per gallery, apply to any similarities ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CalibratorConfig:
    """What is static in a :class:`HubnessCalibrator`, and so not among its arrays: its last three attributes."""

    mode: str
    num_items: int
    neighbours: int = 10


@struct.dataclass
class HubnessCalibrator:
    """What is known of a gallery: a few numbers per item.

    Attributes:
      beta1, beta2: f32 ``[]``, inverse temperatures of the query and the gallery bank (``sinkhorn``: beta1 of both).
      log_norm_q, log_norm_g: f32 ``[n]``, log-sum-exp of each item's responses to the banks; ``csls`` keeps ``r_j`` and
        ``sinkhorn`` its normaliser in the first.  ``None`` where the mode has no use for one.
      active_q, active_g: bool ``[n]``, activation sets, or ``None``.
      responses: f32 ``[n, m]``, each item's bank responses in rising order, ``gc`` only: that mode keeps them all.
      fingerprint: uint32 ``[2]`` of the gallery, or ``None`` if it was never seen.
      mode: one of ``MODES``, static.
      num_items: n, static.
      neighbours: CSLS' k, static.
    """

    beta1: Any
    beta2: Any
    log_norm_q: Any = None
    log_norm_g: Any = None
    active_q: Any = None
    active_g: Any = None
    responses: Any = None
    fingerprint: Any = None
    mode: str = struct.field(pytree_node=False, default="dualis")
    num_items: int = struct.field(pytree_node=False, default=0)
    neighbours: int = struct.field(pytree_node=False, default=10)


def fit(
    query_bank: Float[Array, "m d"],
    gallery_bank: Float[Array, "b d"] | None,
    gallery: Float[Array, "n d"],
    mode: str = "dualis",
    beta1: Scalar = 20.0,
    beta2: Scalar = 5.0,
    k: int = 1,
    neighbours: int = 10,
    steps: int = 10,
    chunk: int = 1024,
    block: int = 16384,
) -> HubnessCalibrator:
    """Fits a calibrator to a gallery of embeddings, streaming over the banks.

    Args:
      query_bank, gallery_bank: embeddings of training queries and training gallery items; only ``dualis``, ``dualdis``
        and ``sinkhorn`` (DBSN: both banks, one above the other) read the second, and ``sinkhorn`` can do without.
      gallery: the items to be searched.
      mode: one of ``MODES``.
      beta1, beta2: inverse temperatures; they must match the scale of the similarities (20 is QB-Norm's for cosines,
        the released code's 1 / 1.99 and 3 are for logits near 100).
      k: bank samples activate their k most similar items (``dis``, ``dualdis``).
      neighbours: CSLS' k.
      steps: of Sinkhorn.
      chunk, block: bank and gallery rows multiplied at a time.

    Raises:
      ValueError: an unknown mode, a missing bank, k or neighbours out of range.
    """
    banks = [query_bank] if gallery_bank is None else [query_bank, gallery_bank]
    _check_mode(mode, len(banks))
    n = gallery.shape[0]
    both = jnp.concatenate(banks) if mode == "sinkhorn" else query_bank
    found: dict[str, Any] = {}
    for name, bank, beta in zip("qg", banks if "dual" in mode else banks[:1], (beta1, beta2), strict=False):
        if mode in ("is", "dis", "dualis", "dualdis"):
            found[f"log_norm_{name}"] = bank_log_normalizer(bank, gallery, beta, chunk, block)
        if mode in ("dis", "dualdis"):
            found[f"active_{name}"] = bank_activation(bank, gallery, k, block, chunk)
    if mode == "csls":
        found["log_norm_q"] = bank_neighbourhood(both, gallery, neighbours, block, chunk)
    if mode == "sinkhorn":
        found["log_norm_q"] = bank_sinkhorn(both, gallery, beta1, steps, chunk)
    if mode == "gc":
        found["responses"] = in_blocks(lambda items: jnp.sort(products(items, both), -1), gallery, chunk)
    return _calibrator(found, mode, beta1, beta2, n, neighbours, fingerprint(gallery))


def from_similarities(
    query_responses: Float[Array, "m n"],
    gallery_responses: Float[Array, "b p"] | None = None,
    mode: str = "dualis",
    beta1: Scalar = 20.0,
    beta2: Scalar = 5.0,
    k: int = 1,
    neighbours: int = 10,
    steps: int = 10,
    gallery: PyTree = None,
) -> HubnessCalibrator:
    """:func:`fit` from precomputed similarities of the banks to the gallery.

    Args:
      query_responses, gallery_responses: T of the two banks, rows of bank samples and columns of gallery items.
      gallery: anything that identifies the gallery (its ids or embeddings), for :func:`check_gallery`.
      mode, beta1, beta2, k, neighbours, steps: as in :func:`fit`.

    Raises:
      ValueError: as :func:`fit`, or banks that were scored against galleries of two sizes.
    """
    banks = [query_responses] if gallery_responses is None else [query_responses, gallery_responses]
    _check_mode(mode, len(banks))
    n = query_responses.shape[1]
    if banks[-1].shape[1] != n:
        raise ValueError(f"query bank was scored against {n} items, gallery bank against {banks[-1].shape[1]}")
    banks = [b.astype(jnp.float32) for b in banks]
    both = jnp.concatenate(banks) if mode == "sinkhorn" else banks[0]
    found: dict[str, Any] = {}
    for name, bank, beta in zip("qg", banks if "dual" in mode else banks[:1], (beta1, beta2), strict=False):
        if mode in ("is", "dis", "dualis", "dualdis"):
            found[f"log_norm_{name}"] = jax.nn.logsumexp(beta * bank, 0)
        if mode in ("dis", "dualdis"):
            found[f"active_{name}"] = activated(top_k(bank, k)[1], n)
    if mode == "csls":
        found["log_norm_q"] = jnp.mean(top_k(both.T, neighbours)[0], -1)
    if mode == "sinkhorn":
        found["log_norm_q"] = sinkhorn_columns(lambda start: beta1 * both, len(both), n, steps, len(both))
    if mode == "gc":
        found["responses"] = jnp.sort(both.T, -1)
    seen = None if gallery is None else fingerprint(gallery)
    return _calibrator(found, mode, beta1, beta2, n, neighbours, seen)


def _calibrator(found, mode, beta1, beta2, n, neighbours, seen) -> HubnessCalibrator:
    beta1, beta2 = jnp.asarray(beta1, jnp.float32), jnp.asarray(beta2, jnp.float32)
    return HubnessCalibrator(beta1, beta2, **found, fingerprint=seen, mode=mode, num_items=n, neighbours=neighbours)


def apply(
    calibrator: HubnessCalibrator,
    similarities: Float[Array, "q n"],
    raw_factor: str = "exponential",
) -> Float[Array, "q n"]:
    """Calibrated scores; only their order matters, within a query and (but for ``dis`` and ``dualdis``) across queries.

    ==========  ========================================================================================
    identity    S
    is          ``beta1 S - lse_q``
    dis         the same where the query's best raw match is in A_q, else ``beta1 S``
    dualis      ``(beta1 + beta2) S - lse_q - lse_g``
    dualdis     the same with each lse only where the best raw match is in its own A
    csls        ``2 S - r_j - r_i``
    gc          minus the number of bank samples that answer to the item more strongly; ties by S
    sinkhorn    ``beta1 S`` minus the normaliser of Sinkhorn between bank and gallery
    ==========  ========================================================================================

    Args:
      calibrator: from :func:`fit` or :func:`from_similarities`.
      similarities: S of queries and the gallery it was fitted to; never changed.
      raw_factor: ``"similarity"`` returns what the released code does: products of exponentials, a factor that is not
        normalised being the raw similarity (``check_exponent`` before; ``dis`` and ``dualdis`` differ in order).

    Raises:
      ValueError: another number of items than the calibrator's.
    """
    c, s = calibrator, similarities.astype(jnp.float32)
    if s.shape[1] != c.num_items:
        raise ValueError(f"query bank was scored against {c.num_items} items, gallery has {s.shape[1]}")
    if c.mode == "identity":
        return s
    if c.mode == "csls":
        return csls(s, c.log_norm_q, c.neighbours)
    if c.mode == "gc":
        lower = jax.vmap(lambda row, x: jnp.searchsorted(row, x, side="right"), (0, 1), 1)(c.responses, s)
        # a monotone map into (-1/2, 1/2) breaks ties by similarity and never crosses a rank
        return (lower - c.responses.shape[1]).astype(jnp.float32) + 0.5 * s / (1.0 + jnp.abs(s))
    gates = _gates(c, s)
    factors = [(c.beta1, c.log_norm_q)] + ([(c.beta2, c.log_norm_g)] if c.log_norm_g is not None else [])
    if raw_factor == "exponential":
        return sum(beta * s - gate * norm for (beta, norm), gate in zip(factors, gates, strict=True))
    if raw_factor != "similarity":
        raise ValueError(f"raw_factor must be 'exponential' or 'similarity', got {raw_factor!r}")
    score = jnp.ones_like(s)
    for (beta, norm), gate in zip(factors, gates, strict=True):
        score = score * jnp.where(gate > 0, jnp.exp(beta * s - norm), s)
    return score


def _gates(c: HubnessCalibrator, s: Array) -> list[Array]:
    """For each factor 1 where it is normalised, else 0: ``[q, 1]``."""
    one = jnp.ones((s.shape[0], 1), jnp.float32)
    actives = [c.active_q] + ([c.active_g] if c.log_norm_g is not None else [])
    return [one if a is None else dynamic_gate(s, a).astype(jnp.float32)[:, None] for a in actives]


# --- online search: the shift as one more coordinate ------------------------------------------------------------------


def fold_gallery(calibrator: HubnessCalibrator, gallery: Float[Array, "n d"]) -> Float[Array, "n e"]:
    """Gallery vectors with the shift appended, ``[g_j; -c_j]``, ``c_j = lse_q,j + lse_g,j``: ``e = d + 1``.

    ``dis`` and ``dualdis`` append each bank's shift by itself, so that a query can leave it out.

    Raises:
      ValueError: another gallery size, or ``gc``, which is no inner product.
    """
    c = calibrator
    if c.mode == "gc":
        raise ValueError("mode 'gc' ranks among bank responses: it has no folded form; use apply on similarities")
    if gallery.shape[0] != c.num_items:
        raise ValueError(f"query bank was scored against {c.num_items} items, gallery has {gallery.shape[0]}")
    shifts = [x for x in (c.log_norm_q, c.log_norm_g) if x is not None] or [jnp.zeros(c.num_items)]
    if c.active_q is None:
        shifts = [sum(shifts)]
    return jnp.concatenate([gallery.astype(jnp.float32), -jnp.stack(shifts, 1)], 1)


def fold_queries(
    calibrator: HubnessCalibrator, queries: Float[Array, "q d"], nearest: Any = None
) -> Float[Array, "q e"]:
    """Query vectors for :func:`fold_gallery`'s: ``[(beta1 + beta2) q; 1]``.

    Args:
      calibrator, queries: the same space as the gallery's.
      nearest: i32 ``[q]``, each query's best raw match: ``dis`` and ``dualdis`` need it (one more search).
    """
    c = calibrator
    if c.active_q is not None and nearest is None:
        raise ValueError(
            f"mode {c.mode!r} gates each query by its best raw match: pass nearest, or use calibrated_topk"
        )
    scale = {"identity": 1.0, "csls": 2.0}.get(c.mode, c.beta1 + c.beta2 * (c.log_norm_g is not None))
    flags = [jnp.ones(queries.shape[0], jnp.float32)]
    if c.active_q is not None:
        flags = [a[nearest].astype(jnp.float32) for a in (c.active_q, c.active_g) if a is not None]
    return jnp.concatenate([scale * queries.astype(jnp.float32), jnp.stack(flags, 1)], 1)


def calibrated_topk(
    calibrator: HubnessCalibrator,
    queries: Float[Array, "q d"],
    gallery: Float[Array, "n d"],
    k: int,
    chunk: int = 16384,
) -> Found:
    """The k best items by calibrated score, by exact inner-product search: no ``[q, n]`` scores are ever held.

    Scores are :func:`apply`'s, but for CSLS' ``r_i``, which is constant in a row and left out.

    Raises:
      ValueError: as :func:`fold_gallery`; k or chunk out of range.
    """
    nearest = None
    if calibrator.active_q is not None:
        nearest = mips_topk(queries, gallery, 1, chunk)[1][:, 0]
    folded = fold_gallery(calibrator, gallery)
    return mips_topk(fold_queries(calibrator, queries, nearest), folded, k, chunk)


# --- checks on the host, plain arrays ---------------------------------------------------------------------------------


def check_gallery(calibrator: HubnessCalibrator, gallery: PyTree) -> None:
    """Raises ValueError unless the calibrator was fitted to this gallery (its embeddings, or what identified it)."""
    if calibrator.fingerprint is None:
        raise ValueError("the calibrator was fitted without a gallery: pass gallery= to from_similarities")
    if not np.array_equal(np.asarray(calibrator.fingerprint), np.asarray(fingerprint(gallery))):
        raise ValueError(f"the calibrator was fitted to another gallery of {calibrator.num_items} items: fit it again")


def check_settings(mode: str, beta1: float, beta2: float, k: int, num_items: int) -> None:
    """Raises ValueError for an unknown mode, an inverse temperature that is not positive, or k outside ``[1, n]``."""
    _check_mode(mode, 2)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not (beta > 0 and np.isfinite(beta)):
            raise ValueError(f"{name} must be a positive number, got {beta}")
    if not 1 <= k <= num_items:
        raise ValueError(f"k must be in [1, {num_items}], the items of the gallery; got {k}")


def check_similarities(similarities: Any, query_responses: Any, gallery_responses: Any = None) -> None:
    """Refuses matrices that do not belong together, and warns of a bank that holds the test queries themselves.

    Raises:
      ValueError: an empty bank, another gallery size, or numbers that are not finite.
    """
    s = np.asarray(similarities)
    for name, bank in (("query bank", query_responses), ("gallery bank", gallery_responses)):
        if bank is not None:
            bank = np.asarray(bank)
            if not len(bank):
                raise ValueError(f"the {name} is empty; a bank needs at least one sample")
            if bank.shape[1] != s.shape[1]:
                raise ValueError(f"{name} was scored against {bank.shape[1]} items, gallery has {s.shape[1]}")
            _check_finite(name, bank)
    _check_finite("similarities", s)
    _warn_transductive(np.asarray(query_responses), s)


def check_vectors(queries: Any, gallery: Any, query_bank: Any, gallery_bank: Any = None) -> None:
    """:func:`check_similarities` for embeddings.

    Raises:
      ValueError: an empty bank or array, another dimension than the gallery's, or numbers that are not finite.
    """
    gallery = np.asarray(gallery)
    named = {"queries": queries, "gallery": gallery, "query bank": query_bank, "gallery bank": gallery_bank}
    for name, x in named.items():
        if x is None:
            continue
        x = np.asarray(x)
        if not len(x):
            raise ValueError(f"the {name} is empty; it needs at least one sample")
        if x.shape[1] != gallery.shape[1]:
            raise ValueError(f"{name}: vectors have {x.shape[1]} dimensions, the gallery's {gallery.shape[1]}")
        _check_finite(name, x)
    _warn_transductive(np.asarray(query_bank), np.asarray(queries))


def check_exponent(similarities: Any, *betas: float) -> None:
    """Raises ValueError if exponentials of these similarities would overflow (``raw_factor="similarity"``)."""
    largest = max(betas) * float(np.max(np.abs(np.asarray(similarities)), initial=0.0))
    if largest > 80:
        raise ValueError(f"beta x max|S| is {largest:.4g}, above 80: use log mode or lower beta")


def _check_mode(mode: str, banks: int) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if "dual" in mode and banks < 2:
        raise ValueError(f"mode {mode!r} needs a gallery bank as well; 'is' and 'dis' use a query bank alone")


def _check_finite(name: str, x: np.ndarray) -> None:
    bad = ~np.isfinite(x)
    if bad.any():
        raise ValueError(f"{name}: {int(bad.sum())} values are not finite, the first in row {np.argwhere(bad)[0][0]}")


def _warn_transductive(bank: np.ndarray, queries: np.ndarray) -> None:
    known = {row.tobytes() for row in np.ascontiguousarray(queries, np.float32)}
    same = sum(row.tobytes() in known for row in np.ascontiguousarray(bank, np.float32))
    if same:
        warnings.warn(
            f"{same} of {len(bank)} query bank samples are test queries themselves: scores are transductive",
            stacklevel=3,
        )


def to_arrays(calibrator: HubnessCalibrator) -> dict[str, Any]:
    """A calibrator's arrays, for checkpoints."""
    fields = [f.name for f in dataclasses.fields(calibrator) if f.metadata.get("pytree_node", True)]
    return {name: getattr(calibrator, name) for name in fields if getattr(calibrator, name) is not None}


def calibrator_from_arrays(config: CalibratorConfig, arrays: Any) -> HubnessCalibrator:
    """Undoes :func:`to_arrays`."""
    kept = {name: jnp.asarray(value) for name, value in arrays.items()}
    return HubnessCalibrator(**kept, **dataclasses.asdict(config))


CARD = Card(
    name="dbnorm",
    family="retrieval",
    title="Balance Act: Mitigating Hubness in Cross-Modal Retrieval with Query and Gallery Banks",
    year=2023,
    kind="closed form",
    idea=(
        "A few gallery items are near neighbours of very many queries. Every item's similarity is divided by how "
        "strongly the item answers a bank of training queries, and once more by how strongly it answers a bank of "
        "gallery items: two inverted softmaxes, one shift per item in log space, folded into inner-product search."
    ),
    citation="Wang, Jian, Xue; EMNLP 2023, arXiv 2310.11612. QB-Norm: Bogolin et al.; CVPR 2022, arXiv 2112.12777",
    plugs_into=(
        "any dual encoder's embeddings or similarity matrix, either direction",
        "zero-shot classification with class prompts as the gallery",
        "mips_topk: one appended coordinate",
    ),
    pieces=(
        "inverted_softmax", "dynamic_gate", "csls", "HubnessCalibrator", "fit", "from_similarities", "apply",
        "fold_gallery", "fold_queries", "calibrated_topk", "check_gallery", "check_similarities",
        "zoo.ops.banks:bank_log_normalizer", "zoo.ops.banks:sharded_bank_log_normalizer",
        "zoo.ops.banks:bank_activation", "zoo.ops.banks:bank_neighbourhood", "zoo.ops.banks:bank_sinkhorn",
        "zoo.ops.sinkhorn:sinkhorn_normalize", "zoo.metrics.hubness:k_occurrence",
        "zoo.metrics.hubness:hubness_skewness", "zoo.metrics.matching:match_ranks",
    ),
    claim=Claim(
        statement=(
            "With a query bank of only 50 samples, multiplying by a gallery bank's inverted softmax (DualIS, beta 20 "
            "and 5) finds more right items first than the query bank alone (IS, beta 20), on 500 pairs with hubs"
        ),
        metric="recall_at_1",
        effect=0.005,
        method="DualIS (20, 5)",
        baseline="IS (20)",
        trivial="raw similarity",
        seeds=10,
        budget="the same pairs, the same 50 bank queries; 1000 bank items for DualIS; temperatures fixed beforehand",
    ),
    cost="O((M_q + M_g) N_g d) once, streamed in O(chunk x block) memory; then one more coordinate in the search",
    official_code="https://github.com/yimuwangcs/Better_Cross_Modal_Retrieval and https://github.com/ioanacroi/qb-norm",
    departures=(
        "db_norm normalises the bank x gallery matrix instead of the test matrix in both calls; here the test matrix.",
        "qb_norm writes into its input: ungated rows stay raw similarities beside exponentials, and DualDIS reads the "
        "mutated matrix; here log scores whose ungated factor is beta S (raw_factor='similarity' for the code's).",
        "exp(beta S) overflows for logits; log-sum-exp here.",
        "The skewness counts items that are never returned, which the released function leaves out.",
    ),
)  # fmt: skip
