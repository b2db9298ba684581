"""Memory of the pair losses, read off the compiled gradients; the timing itself is not run here."""

import jax
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
