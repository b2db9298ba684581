"""Relative representations: encoders and decoders that never met, stitched through shared anchors.

Moschella, Maiorca, Fumero, Norelli, Locatello, Rodola: "Relative representations enable zero-shot latent space
communication", ICLR 2023, arXiv 2209.15430.

Two networks trained on the same semantics often have latent spaces that differ by (nearly) an angle-preserving map, so
that neither a head nor a decoder transfers.  Say each latent by its cosines to the latents of a fixed list of *anchor*
samples: the result is the same after rotations, reflections and rescalings of the space, has one coordinate per anchor
whatever the encoder's width, and a head trained on one encoder's relative representations reads another's.

Frozen encoders: project their latents (:func:`relative_projection`) and train a :class:`StitchingHead`.  End to end:
:class:`RelativeModel` with the objectives of :mod:`zoo.representation.relative_hosts`, which encode the anchors again
in every step.  Either way :func:`stitch` joins encoder i and head j without any training.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.catalogue import Card, Claim
from zoo.metrics.latents import latent_distance
from zoo.nn.norm import BatchNorm
from zoo.nn.stitching_heads import RelativeHead, SimilarityAttention, StitchingHead, batch_standardise
from zoo.ops.anchors import AnchorSet, check_anchors, check_same_anchors, select_anchors
from zoo.ops.prototypes import l2_normalize
from zoo.ops.stitching import Stitchable, own_and_stitched, stitch, stitching_matrix

__all__ = [
    "AnchorSet", "RelativeHead", "RelativeLayer", "RelativeModel", "SimilarityAttention", "Stitchable", "StitchingHead",
    "basis_change", "batch_standardise", "check_anchors", "check_same_anchors", "class_means", "distances_to_reference",
    "own_and_stitched", "quantise_ste", "relative_projection", "select_anchors", "smooth_step", "stitch", "stitchable",
    "stitching_matrix", "subspace_relative",
]  # fmt: skip

SIMILARITIES = ("cosine", "inner", "basis")
QUANTISERS = ("none", "round", "smooth")
POOLS = ("concat", "sum", "mean", "max", "linear")
VALUES = ("similarities", "trainable", "anchors", "self_attention", "relative_anchors")
NORMS = ("layer", "l2", "batch", "standardise", "none")

# --- the projection (paper, section 3) --------------------------------------------------------------------------------


def relative_projection(
    x: Float[Array, "b d"], anchors: Float[Array, "k e"], similarity: str = "cosine", eps: float = 1e-12
) -> Float[Array, "b k"]:
    """``r(x)_j``: the similarity of x to anchor j.

    Args:
      x, anchors: latents of one encoder (d = e).
      similarity: ``"cosine"`` (the paper's): ``<x, a> / (|x| |a|)``, invariant to ``x, a -> c x Q, c a Q``;
        ``"inner"``: ``<x, a> / sqrt(d)``, invariant to Q only; ``"basis"``: :func:`basis_change`.
      eps: lengths below it count as it; a latent that short has no direction, and gets no gradient.

    Returns:
      f32 ``[b, k]``.

    Raises:
      ValueError: an unknown similarity, or anchors of another width.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}; got {similarity!r}")
    d, e = x.shape[-1], anchors.shape[-1]
    if d != e:
        raise ValueError(f"latent dim {d} vs anchors {e}: anchors must come from the same encoder")
    x, anchors = x.astype(jnp.float32), anchors.astype(jnp.float32)
    if similarity == "basis":
        return basis_change(x, anchors)
    if similarity == "cosine":
        return jnp.matmul(l2_normalize(x, eps), l2_normalize(anchors, eps).T, precision="highest")
    return jnp.matmul(x, anchors.T, precision="highest") / d**0.5


def basis_change(x: Float[Array, "b d"], anchors: Float[Array, "k d"]) -> Float[Array, "b k"]:
    """Coefficients of x in the anchors' frame: the shortest c with least ``|A^T c - x|``.

    With d independent anchors it is invariant to every invertible linear map of the space.
    """
    return jnp.linalg.lstsq(anchors.T.astype(jnp.float32), x.T.astype(jnp.float32))[0].T


def quantise_ste(r: Float[Array, "*b k"], bin_size: float) -> Float[Array, "*b k"]:
    """Rounds to multiples of ``bin_size``; the gradient passes as if nothing had happened (straight through)."""
    return r + jax.lax.stop_gradient(jnp.round(r / bin_size) * bin_size - r)


def smooth_step(r: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """``r - sin(2 pi r) / (2 pi)``: flat at whole numbers, with a gradient everywhere else."""
    return r - jnp.sin(2 * jnp.pi * r) / (2 * jnp.pi)


def subspace_relative(
    x: Float[Array, "b d"], anchors: Float[Array, "k e"], groups: int, similarity: str = "cosine"
) -> Float[Array, "b g k"]:
    """The projection within each of ``groups`` equal blocks of coordinates: invariant to a rotation of each block.

    Raises:
      ValueError: blocks that do not divide the width, or as :func:`relative_projection`.
    """
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"subspaces must divide the {x.shape[-1]} dimensions of a latent, got {groups}")
    if x.shape[-1] != anchors.shape[-1]:
        raise ValueError(
            f"latent dim {x.shape[-1]} vs anchors {anchors.shape[-1]}: anchors must come from the same encoder"
        )
    blocks = zip(jnp.split(x, groups, -1), jnp.split(anchors, groups, -1), strict=True)
    return jnp.stack([relative_projection(part, own, similarity) for part, own in blocks], 1)


def class_means(
    r: Float[Array, "*b k"], labels: Int[Array, "k"], num_classes: int, groups: int = 1
) -> Float[Array, "*b c"]:
    """Mean similarity by class of anchor, ``[..., num_classes * groups]`` (appendix, aggregation).

    With groups, the i-th anchor of a class goes to group ``i mod groups``; column ``g * num_classes + c`` holds class c
    of group g.  A column without anchors is 0.
    """
    one_hot = labels[:, None] == jnp.arange(num_classes)
    turn = jnp.sum(jnp.where(one_hot, jnp.cumsum(one_hot, 0) - 1, 0), 1)
    column = (turn % groups) * num_classes + labels
    member = (column[:, None] == jnp.arange(num_classes * groups)).astype(jnp.float32)
    share = member / jnp.maximum(jnp.sum(member, 0), 1.0)
    return jnp.matmul(r.astype(jnp.float32), share, precision="highest")


# --- modules ----------------------------------------------------------------------------------------------------------


class RelativeLayer(nn.Module):
    """From latents and the anchors' latents to what a head reads.

    Attributes:
      similarity: see :func:`relative_projection`.
      subspaces, pool: blocks of the latent, and how their similarities are joined: ``"concat"``, ``"sum"``, ``"mean"``,
        ``"max"`` or ``"linear"`` (a trained map of all to k).
      num_classes, class_groups: average over anchors by class (:func:`class_means`); 0 averages nothing.
      quantise, bin_size: ``"round"`` (:func:`quantise_ste`) or ``"smooth"`` (:func:`smooth_step`).
      latent_bin: quantise the (for cosine: normalised) latents too, straight through; 0 does not.
      values: ``"similarities"`` (the paper's method); ``"trainable"``: softmax(r) V; ``"anchors"``: softmax(r) A (unit
        length for cosine), which turns with the space; ``"self_attention"``: :class:`SimilarityAttention`;
        ``"relative_anchors"``: r after a layer norm, times the anchors' own relative representations.
      features: width of trainable values.
      attention_features: of self-attention.
      norm: ``"layer"`` (affine), ``"l2"``, ``"batch"``, ``"standardise"`` (:func:`batch_standardise`) or ``"none"``.
      axis_name: see :class:`zoo.nn.norm.BatchNorm`.
    """

    similarity: str = "cosine"
    subspaces: int = 1
    pool: str = "concat"
    num_classes: int = 0
    class_groups: int = 1
    quantise: str = "none"
    bin_size: float = 0.1
    latent_bin: float = 0.0
    values: str = "similarities"
    features: int = 64
    attention_features: int = 16
    norm: str = "layer"
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b d"],
        anchors: Float[Array, "k e"],
        labels: Int[Array, "k"] | None = None,
        train: bool = False,
        mask: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b f"]:
        """``[B, d]`` and ``[k, d]`` to ``[B, k]`` (or what pooling, averaging and values make of it).

        Raises:
          ValueError: an unknown choice, or averaging by class without the anchors' labels.
        """
        self._check()
        r = self._similarities(x, anchors, labels)
        if self.values == "trainable":
            shape = (r.shape[-1], self.features)
            r = nn.softmax(r) @ self.param("values", nn.initializers.normal(1.0), shape)
        elif self.values == "anchors":
            own = anchors.astype(jnp.float32)
            r = nn.softmax(r) @ (l2_normalize(own) if self.similarity == "cosine" else own)
        elif self.values == "self_attention":
            r = SimilarityAttention(self.attention_features, name="attention")(r)
        elif self.values == "relative_anchors":
            own = self._similarities(anchors, anchors, labels)
            r = nn.LayerNorm(epsilon=1e-5, name="similarity_norm")(r) @ own
        if self.norm == "layer":
            return nn.LayerNorm(epsilon=1e-5, name="norm")(r)
        if self.norm == "batch":
            return BatchNorm(axis_name=self.axis_name, name="norm")(r, train, mask)
        if self.norm == "standardise":
            return batch_standardise(r, mask, axis_name=self.axis_name)
        return l2_normalize(r) if self.norm == "l2" else r

    def _similarities(self, x: Array, anchors: Array, labels: Array | None) -> Array:
        if self.latent_bin:
            r = self._rounded(x, anchors)
        else:
            r = subspace_relative(x, anchors, self.subspaces, self.similarity)
        if self.num_classes:
            if labels is None:
                raise ValueError("averaging by class needs the anchors' labels")
            r = class_means(r, labels, self.num_classes, self.class_groups)
        if self.quantise == "round":
            r = quantise_ste(r, self.bin_size)
        elif self.quantise == "smooth":
            r = smooth_step(r)
        if self.pool in ("concat", "linear"):
            flat = r.reshape(r.shape[0], -1)
            return flat if self.pool == "concat" else nn.Dense(r.shape[-1], name="pool")(flat)
        return {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max}[self.pool](r, 1)

    def _rounded(self, x: Array, anchors: Array) -> Array:
        # rounded unit vectors are not scaled to unit length again
        cosine, parts = self.similarity == "cosine", []
        for pair in zip(jnp.split(x, self.subspaces, -1), jnp.split(anchors, self.subspaces, -1), strict=True):
            pair = (l2_normalize(v.astype(jnp.float32)) if cosine else v for v in pair)
            part, own = (quantise_ste(v, self.latent_bin) for v in pair)
            parts.append(part @ own.T if cosine else relative_projection(part, own, self.similarity))
        return jnp.stack(parts, 1)

    def _check(self) -> None:
        known = {"similarity": SIMILARITIES, "pool": POOLS, "quantise": QUANTISERS, "values": VALUES, "norm": NORMS}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.values == "relative_anchors" and (self.subspaces > 1 or self.num_classes or self.pool == "linear"):
            raise ValueError("values 'relative_anchors' need one similarity per anchor: no subspaces, no class means")


class RelativeModel(nn.Module):
    """Any encoder and any head with a relative projection between them; its two halves are what stitching joins.

    Attributes:
      encoder: ``(x, ...) -> [B, d]``; of ``train``, ``mask``, ``keys`` it gets what it asks for.
      head: ``(r, ...) -> outputs``: a classifier, a decoder.
      layer: the projection; ``None`` is the absolute baseline: the head reads the latents.
      axis_name: handed on to all of them.
    """

    encoder: nn.Module
    head: nn.Module
    layer: RelativeLayer | None = RelativeLayer()
    axis_name: str | None = None

    def setup(self):
        """Copies of the parts that know the mapped axis."""
        part = lambda m: m.copy(**({"axis_name": self.axis_name} if hasattr(m, "axis_name") else {}))  # noqa: E731
        self.body, self.top = part(self.encoder), part(self.head)
        if self.layer is not None:
            self.projection = part(self.layer)

    def __call__(self, x, anchors, labels=None, train: bool = False, mask=None, keys=None):
        """Outputs for ``x`` with anchors given as inputs; gradients flow through both."""
        z, own = self.encode(x, train, mask, keys), self.encode(anchors, train)
        return self.decode(self.represent(z, own, labels, train, mask), train, mask, keys)

    def encode(self, x, train: bool = False, mask=None, keys=None, **rest):
        """Latents ``[B, d]``."""
        return self.body(x, **rest, **_asked(self.body, train=train, mask=mask, keys=keys))

    def represent(self, z, anchors, labels=None, train: bool = False, mask=None):
        """Latents to what the head reads."""
        return z if self.layer is None else self.projection(z, anchors, labels, train, mask)

    def decode(self, r, train: bool = False, mask=None, keys=None):
        """What the head makes of it."""
        return self.top(r, **_asked(self.top, train=train, mask=mask, keys=keys))


def _asked(module: nn.Module, **offered) -> dict[str, Any]:
    wanted = inspect.signature(type(module).__call__).parameters
    return {name: value for name, value in offered.items() if name in wanted}


# --- stitching (paper, section 5) -------------------------------------------------------------------------------------


def stitchable(model: RelativeModel, variables: Mapping[str, Any], anchors: AnchorSet) -> Stitchable:
    """A trained model cut in two, with its own latents of the anchors (encoded here unless given)."""
    own = {c: v for c, v in variables.items() if c in ("params", "batch_stats")}
    run = lambda method: functools.partial(_applied, model, method, own)  # noqa: E731
    if anchors.latents is None and model.layer is not None:
        anchors = anchors.replace(latents=run("encode")(anchors.inputs))
    z = jax.eval_shape(run("encode"), anchors.inputs[:1])
    if model.layer is None:
        return Stitchable(run("encode"), run("decode"), None, anchors, z.shape[-1], z.shape[-1])
    reads = jax.eval_shape(run("represent"), z, anchors.latents).shape[-1]
    return Stitchable(run("encode"), run("decode"), run("represent"), anchors, z.shape[-1], reads)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _applied(model, method, variables, *args):
    # models of one architecture share the compiled program
    return model.apply(variables, *args, method=method)


def distances_to_reference(reference: Float[Array, "n k"], others: Float[Array, "m n k"]) -> Float[Array, "m"]:
    """Mean distance of each model's relative latents to those of a good model, on the same samples and anchors.

    The nearest is expected to be the best: model selection without labels (paper, section 4.2).
    """
    return jax.lax.map(lambda r: latent_distance(r, reference), others)


CARD = Card(
    name="relative_representations",
    family="representation",
    title="Relative representations enable zero-shot latent space communication",
    year=2023,
    kind="objective",
    idea=(
        "Networks trained on the same semantics have latent spaces that differ by nearly an angle-preserving map. Each "
        "latent is re-expressed by its cosine similarities to the latents of a fixed list of anchor samples, which no "
        "rotation, reflection or rescaling of the space changes. Encoders that share only the list of anchors become "
        "comparable, and a head or decoder trained on one encoder's relative representations works on another's."
    ),
    citation=(
        "Moschella, Maiorca, Fumero, Norelli, Locatello, Rodola. Relative representations enable zero-shot latent "
        "space communication. ICLR 2023, arXiv 2209.15430"
    ),
    plugs_into=(
        "any frozen encoder's latents",
        "any Flax encoder with a head or decoder, end to end",
        "autoencoders and VAEs",
        "graph networks, trained end to end through their anchors",
        "text encoders, across languages by translated anchors",
        "linear probes on stitched latents",
    ),
    pieces=(
        "relative_projection",
        "basis_change",
        "quantise_ste",
        "smooth_step",
        "subspace_relative",
        "class_means",
        "RelativeLayer",
        "RelativeModel",
        "zoo.nn.stitching_heads:StitchingHead",
        "zoo.nn.stitching_heads:RelativeHead",
        "zoo.nn.stitching_heads:batch_standardise",
        "zoo.representation.relative_hosts:relative_classifier",
        "zoo.representation.relative_hosts:relative_autoencoder",
        "zoo.representation.relative_hosts:relative_nodes",
        "stitchable",
        "zoo.ops.stitching:Stitchable",
        "zoo.ops.stitching:stitch",
        "zoo.ops.stitching:stitching_matrix",
        "distances_to_reference",
        "zoo.ops.anchors:AnchorSet",
        "zoo.ops.anchors:select_anchors",
        "zoo.ops.anchors:check_anchors",
        "zoo.ops.anchors:check_same_anchors",
        "zoo.metrics.latents:topk_jaccard",
        "zoo.metrics.latents:aligned_mrr",
        "zoo.metrics.latents:mean_cosine",
        "zoo.metrics.latents:kernel_cka",
        "zoo.metrics.embeddings:linear_cka",
        "zoo.losses.gaussian:optimal_sigma_nll",
        "zoo.losses.ranking:gaussian_kl",
        "zoo.nn.gcnii:GCNII",
        "zoo.nn.bag_of_words:BagOfWords",
        "zoo.nn.conv_autoencoder:ConvEncoder",
        "zoo.nn.conv_autoencoder:ConvDecoder",
    ),
    claim=Claim(
        statement=(
            "On digits, heads trained on the relative representations (64 shared anchors) of one frozen encoder are "
            "far more accurate on the encoders of other seeds than heads trained on absolute latents of equal size"
        ),
        metric="stitched_accuracy",
        effect=0.5,
        method="relative",
        baseline="absolute",
        trivial="most frequent class",
        seeds=5,
        budget="the same frozen encoders, the same head, steps and batches for both; no tuning in any arm",
    ),
    cost="O(B k d) per batch; end to end the anchors cost k / B of a forward pass more in every step",
    official_code="https://github.com/lucmos/relreps",
    departures=(
        "the stitching head ends with a layer norm; 'batch' gives the code's standardisation over the batch",
        "the anchors' batch statistics are used but not kept; 'official' commits them after those of the batch",
        "quantised latents pass gradients straight through; the code's line for it is without effect",
        "subspaces are normalised after pooling, once; the code normalises each subspace's similarities by itself",
        "reconstruction losses are means over examples of their sums; 'sum' adds them up as the code does",
        "graph networks take a batch of training nodes per step, and 4 layers unless asked; the code takes all, and 32",
        "text encoders are small averaging ones trained on the labels; the paper's are pretrained and frozen",
        "farthest points start at a random sample; clustering of latents to quantise them is left out",
    ),
)
