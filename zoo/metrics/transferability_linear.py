"""Transferability scores from linear models of features: LogME, SFDA and the H-score.  float64, on the host.

What a score says is how well features of a pre-trained model, as they are, fit the target's labels; only the order of
models under one score means anything.  No input is ever changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def check_features(features: Any, labels: Any, least: int = 1) -> tuple[np.ndarray, np.ndarray, int]:
    """Features as float64 ``[N, D]``, labels as int64 ``[N]``, and the number of classes C.

    Args:
      features, labels: arrays of any number type.
      least: samples that every class must have.

    Raises:
      ValueError: other shapes, features that are not finite (the first such row is named), labels that are no
        integers
        or leave a class of 0..C-1 out, a single class, or a class of fewer than ``least`` samples.
    """
    x, y = np.asarray(features, np.float64), np.asarray(labels)
    if x.ndim != 2 or min(x.shape) < 1:
        raise ValueError(f"features must be [N, D], got {list(x.shape)}")
    bad = ~np.isfinite(x).all(1)
    if bad.any():
        raise ValueError(f"features of row {int(bad.argmax())} are not finite")
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise ValueError(f"labels must be one integer for each of the {len(x)} rows, got {y.dtype} {list(y.shape)}")
    if y.min() < 0:
        raise ValueError(f"labels must not be negative, got {y.min()} in row {int(y.argmin())}")
    if y.max() > len(y):
        raise ValueError(_gap(y))
    counts = np.bincount(y)
    if not counts.all():
        raise ValueError(_gap(y))
    if len(counts) < 2:
        raise ValueError("labels hold a single class; there must be two or more")
    if counts.min() < least:
        raise ValueError(
            f"class {int(counts.argmin())} has {counts.min()} sample(s), too few for a variance: give every class at "
            f"least {least}, or leave it out"
        )
    return x, y.astype(np.int64), len(counts)


def _gap(y: np.ndarray) -> str:
    missing = np.setdiff1d(np.arange(min(int(y.max()), len(y)) + 1), y)[0]
    return (
        f"labels must be 0..C-1 without gaps, but class {missing} has no sample (largest label {y.max()}); "
        "np.unique(labels, return_inverse=True)[1] renumbers them"
    )


def class_means(x: np.ndarray, y: np.ndarray, classes: int) -> np.ndarray:
    """Mean of each class, ``[C, D]``."""
    total = np.zeros((classes, x.shape[1]))
    np.add.at(total, y, x)
    return total / np.bincount(y, minlength=classes)[:, None]


# --- LogME ------------------------------------------------------------------------------------------------------------


def logme(features: Any, targets: Any, variant: str = "evidence") -> float:
    """LogME: log evidence per sample of Bayesian linear regression on the features, the mean over targets.

    You, Liu, Wang, Long: "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", ICML 2021; fixed
    point of You et al., JMLR 2022.  Prior precision alpha and noise precision beta are found by at most 11 iterations
    from 1, until alpha / beta changes by a thousandth.

    Args:
      features: ``[N, D]``.
      targets: integers ``[N]``, classes (one target "is it class c?" each); or floats ``[N]`` or ``[N, T]``,
        regression.
      variant: ``"evidence"`` is exact for features that span k < D directions; ``"official"`` keeps the released
        code's ``D/2 log alpha`` where k/2 remains (the same for k = D).

    Raises:
      ValueError: an unknown variant, or features and targets that cannot be used.
    """
    if variant not in ("evidence", "official"):
        raise ValueError(f"variant must be 'evidence' or 'official', got {variant!r}")
    t = np.asarray(targets)
    if t.dtype.kind in "iub":
        x, y, classes = check_features(features, targets)
        t = np.eye(classes)[y]
    else:
        x, t = _regression(features, t)
    n, d = x.shape
    if not x.any():
        raise ValueError("features are all zero: they explain nothing")
    sigma, projected = _spectrum(x, t, absolute=variant == "official")
    outside = np.maximum(np.sum(t**2, 0) - np.sum(projected, 0), 0)
    dimension = d if variant == "official" else len(sigma)
    found = [_evidence(sigma, projected[:, j], outside[j], n, dimension) for j in range(t.shape[1])]
    return float(np.mean(found) / n)


def _regression(features: Any, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(features, np.float64)
    t = t.astype(np.float64)
    t = t[:, None] if t.ndim == 1 else t
    if x.ndim != 2 or t.ndim != 2 or len(t) != len(x) or not x.size or not t.size:
        raise ValueError(f"features must be [N, D] and targets [N] or [N, T], got {list(x.shape)} and {list(t.shape)}")
    for name, v in (("features", x), ("targets", t)):
        bad = ~np.isfinite(v).all(1)
        if bad.any():
            raise ValueError(f"{name} of row {int(bad.argmax())} are not finite")
    return x, t


def _spectrum(x: np.ndarray, t: np.ndarray, absolute: bool) -> tuple[np.ndarray, np.ndarray]:
    # squared singular values [k] of x, and squared coordinates [k, T] of the targets along its left singular vectors
    n, d = x.shape
    if n > d:
        sigma, v = np.linalg.eigh(x.T @ x)
        sigma, v = np.maximum(sigma[::-1], 0), v[:, ::-1]
        along = v.T @ (x.T @ t)
    else:
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        sigma, along = s**2, s[:, None] * (u.T @ t)
    floor = 1e-20 if absolute else sigma[0] * max(n, d) * np.finfo(np.float64).eps
    keep = sigma > floor
    return sigma[keep], along[keep] ** 2 / sigma[keep, None]


def _evidence(sigma: np.ndarray, x2: np.ndarray, outside: float, n: int, dimension: int) -> float:
    alpha = beta = 1.0
    m2 = e2 = 0.0
    for _ in range(11):
        r = alpha / beta
        gamma = np.sum(sigma / (sigma + r))
        m2 = np.sum(sigma * x2 / (r + sigma) ** 2)
        e2 = np.sum(x2 / (1 + sigma / r) ** 2) + outside
        alpha = gamma / (m2 + 1e-5)
        beta = (n - gamma) / (e2 + 1e-5)
        if abs(alpha / beta - r) / r <= 1e-3:
            break
    log_det = np.sum(np.log(alpha + beta * sigma))
    fit = beta * e2 + alpha * m2
    return 0.5 * (dimension * np.log(alpha) + n * np.log(beta) - log_det - fit - n * np.log(2 * np.pi))


# --- H-score ----------------------------------------------------------------------------------------------------------


def h_score(features: Any, labels: Any) -> float:
    """H-score: ``trace(cov(X)^+ cov(E[X | y]))``, between 0 and C - 1.

    Bao et al.: "An Information-Theoretic Approach to Transferability in Task Transfer Learning", ICIP 2019.  The
    pseudo-inverse serves features that do not span their space.

    Args:
      features, labels: ``[N, D]`` and integers ``[N]``.

    Raises:
      ValueError: features or labels that cannot be used.
    """
    x, y, classes = check_features(features, labels)
    x = x - x.mean(0)
    means = class_means(x, y, classes)
    weight = np.bincount(y) / len(y)
    inverse = np.linalg.pinv(x.T @ x / len(x), rcond=1e-12, hermitian=True)
    return float(np.sum((weight[:, None] * means) @ inverse * means))


# --- SFDA -------------------------------------------------------------------------------------------------------------


def sfda(features: Any, labels: Any, variant: str = "official") -> float:
    """SFDA: regularised Fisher discriminants, fitted again after confusing the classes in proportion to their doubt.

    Shao et al.: "Not All Models Are Equal: Predicting Model Transferability in a Self-challenging Fisher Space", ECCV
    2022.  The within-class scatter is shrunk by ``lambda = max(exp(-5 ev), 1e-10)``, ev near its largest eigenvalue;
    each sample is then drawn to the mean of the other classes' means by the doubt of a (twice softened) posterior,
    and the same lambda serves the second fit.

    Args:
      features, labels: ``[N, D]`` and integers ``[N]``.
      variant: ``"official"`` (this score's definition in its code, bounded): the mean posterior of the right class;
        ``"log"``: the mean of its logarithm.

    Raises:
      ValueError: an unknown variant, features or labels that cannot be used, or no variance within classes.
    """
    _check_variant(variant)
    x, y, classes = check_features(features, labels)
    posterior, shrinkage = fisher_posterior(x, y, classes)
    doubt = 1 - _softmax(posterior)[np.arange(len(y)), y][:, None]
    means = class_means(x, y, classes)
    others = (means.sum(0) - means) / (classes - 1)
    mixed = (1 - doubt) * x + doubt * others[y]
    right = fisher_posterior(mixed, y, classes, shrinkage)[0][np.arange(len(y)), y]
    return float(np.mean(right if variant == "official" else np.log(np.maximum(right, 1e-300))))


def fisher_posterior(
    x: np.ndarray, y: np.ndarray, classes: int, shrinkage: float | None = None
) -> tuple[np.ndarray, float]:
    """Posteriors ``[N, C]`` of a regularised linear discriminant, and its shrinkage.

    With all D generalised eigenvectors kept, ``E E^T`` is the inverse of the shrunk within-class scatter:
    coefficients are the solution of a linear system and need no eigenvectors.

    Args:
      x, y, classes: from :func:`check_features`.
      shrinkage: lambda in [0, 1]; by default from the scatter's largest eigenvalue.

    Raises:
      ValueError: no variance within classes.
    """
    n, d = x.shape
    means = class_means(x, y, classes)
    within = x - means[y]
    scatter = within.T @ within / n
    if not np.trace(scatter) > 0:
        raise ValueError("features do not vary within classes: there is no within-class scatter to discriminate by")
    if shrinkage is None:
        shrinkage = max(np.exp(-5 * _largest_eigenvalue(scatter)), 1e-10)
    shrunk = (1 - shrinkage) * scatter + shrinkage * np.trace(scatter) / d * np.eye(d)
    coefficients = np.linalg.solve(shrunk, means.T)
    intercept = np.log(np.bincount(y, minlength=classes) / n) - 0.5 * np.sum(means.T * coefficients, 0)
    return _softmax(x @ coefficients + intercept), float(shrinkage)


def _largest_eigenvalue(a: np.ndarray) -> float:
    # three rounds of two multiplications from the row sums, as the score is defined: not the converged eigenvalue
    x = a.sum(1)
    y = x
    for _ in range(3):
        y = a @ x
        y = y / max(np.linalg.norm(y), 1e-300)
        x = a @ y
        x = x / max(np.linalg.norm(x), 1e-300)
    return float(x @ a @ y)


def _softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _check_variant(variant: str) -> None:
    if variant not in ("log", "official"):
        raise ValueError(f"variant must be 'log' or 'official', got {variant!r}")
