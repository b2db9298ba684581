"""Losses for learning to recommend: one value per example, in float32 whatever the inputs' dtype."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def bpr_loss(positive: Float[Array, "b"], negative: Float[Array, "b"]) -> Float[Array, "b"]:
    """Bayesian personalised ranking: ``-log sigmoid(s_pos - s_neg) = softplus(s_neg - s_pos)``.

    Rendle, Freudenthaler, Gantner and Schmidt-Thieme, UAI 2009, arXiv 1205.2618.
    """
    return jax.nn.softplus(negative.astype(jnp.float32) - positive.astype(jnp.float32))


def binary_cross_entropy(logits: Float[Array, "*n"], labels: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """``-y log sigmoid(z) - (1 - y) log(1 - sigmoid(z))`` for each logit, stable for any size of ``z``."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - labels.astype(jnp.float32) * logits


def pointwise_bce(positive: Float[Array, "b"], negatives: Float[Array, "b n"]) -> Float[Array, "b"]:
    """Cross-entropy of the positive plus the *mean* cross-entropy of its ``n`` negatives (the DSL brief, NeuMF)."""
    ones, zeros = jnp.ones_like(positive), jnp.zeros_like(negatives)
    return binary_cross_entropy(positive, ones) + jnp.mean(binary_cross_entropy(negatives, zeros), axis=-1)


def multinomial_nll(logits: Float[Array, "b i"], counts: Float[Array, "b i"]) -> Float[Array, "b"]:
    """``-sum_i x_i log softmax(logits)_i`` per user.

    Liang, Krishnan, Hoffman and Jebara, WWW 2018, arXiv 1802.05814, equation 2.
    """
    return -jnp.sum(counts.astype(jnp.float32) * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def gaussian_kl(mean: Float[Array, "b d"], log_variance: Float[Array, "b d"]) -> Float[Array, "b"]:
    """``KL(N(mean, exp(log_variance)) || N(0, 1))`` summed over the latent axes."""
    mean, log_variance = mean.astype(jnp.float32), log_variance.astype(jnp.float32)
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance, axis=-1)


def linear_anneal(step: int | Int[Array, ""], steps: int, cap: float) -> Float[Array, ""]:
    """``min(cap, step / steps)``: the weight of a term that is warmed up (``cap`` at once if ``steps`` is 0)."""
    if steps <= 0:
        return jnp.asarray(cap, jnp.float32)
    return jnp.minimum(jnp.asarray(cap, jnp.float32), jnp.asarray(step, jnp.float32) / steps)
