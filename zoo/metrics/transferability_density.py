"""Transferability scores from densities and similarities: LEEP, NCE, NLEEP, PARC and GBC.  float64, on the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.metrics.rank_correlation import spearman
from zoo.metrics.transferability_linear import _check_variant, check_features, class_means
from zoo.ops.kmeans import kmeans

# --- through a source classifier: LEEP, NCE ---------------------------------------------------------------------------


def leep(source: Any, labels: Any, variant: str = "log") -> float:
    """LEEP: how well the target label is predicted through a source classifier's classes z.

    Nguyen, Hassner, Seeger, Archambeau: "LEEP: A New Measure to Evaluate Transferability of Learned Representations",
    ICML 2020.  ``p(y | z) = p(y, z) / p(z)`` with ``p(y, z)`` the mean of ``p(z | x)`` over samples of class y; the
    score is the mean of ``log sum_z p(y_i | z) p(z | x_i)``, at most 0.

    Args:
      source: ``[N, Z]`` probabilities of source classes (rows sum to 1).
      labels: integers ``[N]``.
      variant: ``"log"``; ``"official"`` drops the logarithm.

    Raises:
      ValueError: an unknown variant, rows that are no probabilities, or labels that cannot be used.
    """
    _check_variant(variant)
    p, y, classes = check_features(source, labels)
    wrong = (p < -1e-6).any(1) | (np.abs(p.sum(1) - 1) > 1e-3)
    if wrong.any():
        raise ValueError(
            f"source probabilities of row {int(wrong.argmax())} are no distribution; apply softmax to logits"
        )
    joint = class_means(p, y, classes) * (np.bincount(y) / len(y))[:, None]
    marginal = joint.sum(0)
    conditional = joint / np.where(marginal > 0, marginal, 1)
    right = np.sum(conditional[y] * p, 1)
    return float(np.mean(right if variant == "official" else np.log(np.maximum(right, 1e-300))))


def nce(source_labels: Any, labels: Any) -> float:
    """NCE: minus the conditional entropy ``-H(Y | Z)`` of target labels given source labels, at most 0 (nats).

    Tran, Nguyen, Hassner: "Transferability and Hardness of Supervised Classification Tasks", ICCV 2019.

    Args:
      source_labels: integers ``[N]``, the source classifier's decisions, of any numbering; or its probabilities or
        logits ``[N, Z]``, whose largest decides.
      labels: integers ``[N]``.

    Raises:
      ValueError: labels that cannot be used.
    """
    z = np.asarray(source_labels)
    z = z.argmax(1) if z.ndim == 2 else z
    if z.ndim != 1 or z.dtype.kind not in "iu":
        raise ValueError(f"source labels must be integers [N] or scores [N, Z], got {z.dtype} {list(z.shape)}")
    z = np.unique(z, return_inverse=True)[1]
    _, y, classes = check_features(z[:, None], labels)
    joint = np.zeros((classes, z.max() + 1))
    np.add.at(joint, (y, z), 1 / len(y))
    conditional = joint / joint.sum(0)
    return float(np.sum(joint * np.log(np.where(joint > 0, conditional, 1))))


# --- NLEEP ------------------------------------------------------------------------------------------------------------


def principal_components(x: np.ndarray, most: int | None = None, energy: float | None = None) -> np.ndarray:
    """Coordinates ``[N, m]`` along the first principal components, each one's largest entry positive.

    The sign matters to PARC: correlations of rows change with it.

    Args:
      x: ``[N, D]``.
      most: m, cut to the rank.
      energy: or as many as hold more than this share of the variance.
    """
    centred = x - x.mean(0)
    u, s, v = np.linalg.svd(centred, full_matrices=False)
    u = u * np.where(np.take_along_axis(v, np.abs(v).argmax(1)[:, None], 1)[:, 0] < 0, -1, 1)
    rank = max(1, int(np.sum(s > (s[0] if len(s) else 0) * max(x.shape) * np.finfo(np.float64).eps)))
    m = rank if most is None else min(most, rank)
    if energy is not None:
        share = np.cumsum(s**2) / max(np.sum(s**2), 1e-300)
        m = min(m, int(np.searchsorted(share, energy, side="right")) + 1)
    return u[:, :m] * s[:m]


def gaussian_mixture(
    x: np.ndarray, assignment: np.ndarray, components: int, iterations: int = 50, ridge: float = 1e-6
) -> np.ndarray:
    """Posteriors ``[N, K]`` of a mixture of Gaussians with full covariances, by EM.

    Args:
      x: ``[N, m]``.
      assignment: integers ``[N]``, the component each sample starts in.
      components: K.
      iterations: of expectation and maximisation, after a first maximisation on the assignment.
      ridge: added to variances.
    """
    posterior = np.eye(components)[assignment]
    for _ in range(iterations + 1):
        weight = posterior.sum(0) + 10 * np.finfo(np.float64).eps
        means = posterior.T @ x / weight[:, None]
        joint = np.empty((len(x), components))
        for j in range(components):
            away = x - means[j]
            covariance = (posterior[:, j] * away.T) @ away / weight[j] + ridge * np.eye(x.shape[1])
            factor = np.linalg.cholesky(covariance)
            white = np.linalg.solve(factor, away.T)
            log_det = 2 * np.sum(np.log(np.diag(factor)))
            joint[:, j] = -0.5 * (np.sum(white**2, 0) + log_det) + np.log(weight[j])
        top = joint.max(1, keepdims=True)
        posterior = np.exp(joint - top)
        posterior = posterior / posterior.sum(1, keepdims=True)
    return posterior


def nleep(
    features: Any,
    labels: Any,
    ratio: float | int = 5,
    variant: str = "log",
    energy: float = 0.8,
    iterations: int = 50,
    seed: int = 0,
) -> float:
    """NLEEP: LEEP with the components of a Gaussian mixture of the features in place of source classes.

    Li et al.: "Ranking Neural Checkpoints", CVPR 2021.

    Args:
      features, labels: ``[N, D]`` and integers ``[N]``.
      ratio: components per class (the paper's 5; 1 where classes are many).
      variant: as :func:`leep`.
      energy: share of variance that principal components keep.
      iterations: of EM.
      seed: of the k-means start.

    Raises:
      ValueError: an unknown variant, features or labels that cannot be used, or fewer samples than components.
    """
    _check_variant(variant)
    x, y, classes = check_features(features, labels)
    components = max(1, round(ratio * classes))
    if components > len(x):
        raise ValueError(
            f"{components} components ({ratio} for each of {classes} classes) for {len(x)} samples: lower ratio"
        )
    z = principal_components(x, energy=energy)
    scaled = jnp.asarray(z / max(np.abs(z).max(), 1e-300), jnp.float32)
    start = np.asarray(kmeans(jax.random.key(seed), scaled, components).assignment)
    return leep(gaussian_mixture(z, start, components, iterations), y, variant)


# --- PARC -------------------------------------------------------------------------------------------------------------


def parc(features: Any, labels: Any, dims: int = 32, most: int = 15_000, seed: int = 0, variant: str = "ties") -> float:
    """PARC: 100 times Spearman's correlation of sample dissimilarities in features and in labels.

    Bolya, Mittapalli, Hoffman: "Scalable Diverse Model Selection for Accessible Transfer Learning", NeurIPS 2021.
    Dissimilarity is 1 minus the correlation of two rows: of features reduced to principal components with standardised
    columns, and of one-hot labels.  O(min(N, most)^2) memory.

    Args:
      features, labels: ``[N, D]`` and integers ``[N]``.
      dims: principal components kept, at least 2.
      most: samples used; of more, a random part in which every class keeps its share.
      seed: of that part.
      variant: ``"ties"``: labels are equal or not, and pairs tie exactly; ``"official"`` correlates one-hot rows in
        floating point as released, where rounding breaks some ties.

    Raises:
      ValueError: an unknown variant, features or labels that cannot be used, or features of a single dimension, whose
        rows do not correlate.
    """
    if variant not in ("ties", "official"):
        raise ValueError(f"variant must be 'ties' or 'official', got {variant!r}")
    x, y, classes = check_features(features, labels)
    if len(x) > most:
        rows = _stratified(y, classes, most, seed)
        x, y = x[rows], y[rows]
    z = principal_components(x, dims)
    if z.shape[1] < 2:
        raise ValueError("features vary in one dimension only: rows of one number have no correlation")
    z = z / z.std(0)
    apart = y[:, None] != y[None, :] if variant == "ties" else 1 - np.corrcoef(np.eye(classes)[y])
    upper = np.triu_indices(len(z), 1)
    return 100 * spearman(1 - np.corrcoef(z)[upper], apart[upper])


def _stratified(y: np.ndarray, classes: int, most: int, seed: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(len(y))
    counts = np.bincount(y, minlength=classes)
    keep = np.maximum(1, counts * most // len(y))
    return np.sort(np.concatenate([order[y[order] == c][: keep[c]] for c in range(classes)]))


# --- GBC --------------------------------------------------------------------------------------------------------------


def gbc(features: Any, labels: Any, covariance: str = "diagonal", dims: int = 64) -> float:
    """GBC: minus the summed Bhattacharyya coefficients ``exp(-B_ab)`` of all ordered pairs of classes as Gaussians.

    Pandy, Agostinelli, Uijlings, Ferrari, Mensink: "Transferability Estimation using Bhattacharyya Class
    Separability", CVPR 2022.  ``B_ab = 1/8 (m_a - m_b)' S^-1 (m_a - m_b) + 1/2 log(det S / sqrt(det S_a det S_b))``,
    S the mean of the two covariances.  Variances are held above a millionth of the overall mean variance.

    Args:
      features, labels: ``[N, D]`` and integers ``[N]``, two or more samples in each class.
      covariance: ``"diagonal"`` or ``"spherical"``.
      dims: principal components kept.

    Raises:
      ValueError: an unknown covariance, or features and labels that cannot be used.
    """
    if covariance not in ("diagonal", "spherical"):
        raise ValueError(f"covariance must be 'diagonal' or 'spherical', got {covariance!r}")
    x, y, classes = check_features(features, labels, least=2)
    z = principal_components(x, dims)
    means = class_means(z, y, classes)
    variances = class_means((z - means[y]) ** 2, y, classes)
    if covariance == "spherical":
        variances = np.repeat(variances.mean(1, keepdims=True), z.shape[1], 1)
    variances = np.maximum(variances, max(1e-6 * z.var(0).mean(), 1e-300))
    total = 0.0
    for a in range(classes):
        pooled = (variances[a] + variances) / 2
        away = np.sum((means[a] - means) ** 2 / pooled, 1) / 8
        shape = 0.5 * np.sum(np.log(pooled) - 0.5 * (np.log(variances[a]) + np.log(variances)), 1)
        total += np.sum(np.delete(np.exp(-away - shape), a))
    return float(-total)
