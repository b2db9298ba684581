"""Memory of the pair losses, read off the compiled gradients, and what they are timed against; nothing is timed."""

import jax
import numpy as np
import pytest

from trainers import bench_losses, reference_baselines

ROWS, DIMENSION = 1024, 16
CASES = bench_losses.gradients(ROWS, DIMENSION)


@pytest.mark.parametrize("name", CASES)
def test_memory_stays_within_a_few_matrices_or_without_one(name):
    fn, args, flops = CASES[name]
    used = jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes
    matrix = 4 * ROWS * ROWS
    if "streamed" in name:
        # four times the rows take four times the memory, not sixteen
        big = bench_losses.gradients(4 * ROWS, DIMENSION)[name]
        at_four_times = jax.jit(big[0]).lower(*big[1]).compile().memory_analysis().temp_size_in_bytes
        assert at_four_times < 5 * used
    else:
        assert used < 32 * matrix, f"{used / matrix:.1f} matrices"
    assert flops > 0


def test_without_the_other_library_there_is_no_baseline(monkeypatch):
    monkeypatch.setattr(reference_baselines.importlib.util, "find_spec", lambda name: None)
    assert reference_baselines.metric_learning_baselines("tcm") == {}


@pytest.mark.parametrize("name", [
    "supervised contrastive, matrix", "contrastive pairs, matrix", "multi similarity, matrix",
    "triplet, batch hard, matrix", "tcm, matrix", "proxy anchor",
])  # fmt: skip
def test_the_other_library_computes_the_same_gradient(name):
    pytest.importorskip("pytorch_metric_learning")
    fn, args, _ = bench_losses.gradients(128, 16)[name]
    theirs = reference_baselines.metric_learning_baselines(name.removesuffix(", matrix"))["pytorch-metric-learning"]
    mine = np.asarray(jax.jit(fn)(*args))
    np.testing.assert_allclose(mine, theirs(*args), rtol=1e-4, atol=1e-5 * np.abs(mine).max())


def test_what_the_other_library_cannot_hold_is_timed_on_fewer_rows(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_losses, "metric_learning_baselines", lambda name: asked.append(name) or {"theirs": len})
    made = {b.name: b for b in bench_losses.benchmarks()}
    assert "proxy anchor" in asked and "triplet, batch hard" in asked
    assert made["multi similarity, matrix"].baselines and not made["supervised contrastive, streamed"].baselines
    assert not made["tcm, matrix"].baselines and len(made["tcm, matrix"].args[0]) == bench_losses.B
    small = made["tcm, matrix, B=512"]
    assert small.baselines and len(small.args[0]) == 512 and "B=512" in small.note
