"""The spatial gate against the released layer's numbers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from zoo.nn.attention_gate import SpatialAttentionGate

GOLD = np.load(Path(__file__).resolve().parents[2] / "golden" / "dynamic_subspace_official.npz")


def test_equals_the_released_layer():
    params = {
        f"conv{i}": {"kernel": GOLD[f"att_w{i}"].transpose(2, 3, 1, 0), "bias": GOLD[f"att_b{i}"]} for i in (1, 2, 3)
    }
    x = jnp.asarray(GOLD["att_x"].transpose(0, 2, 3, 1))
    gated, weight = SpatialAttentionGate(4, 1).apply({"params": params}, x)
    np.testing.assert_allclose(weight, GOLD["att_y"].transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(gated, x * weight, rtol=1e-6)
    assert weight.shape == (2, 5, 4, 1)
