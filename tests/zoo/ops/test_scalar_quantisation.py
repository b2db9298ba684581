"""LVQ codes against their definition, the released codec's numbers, and searches over any kind of rows."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops import scalar_quantisation as sq

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "leanvec_official.npz")
RNG = np.random.default_rng(0)
VECTORS = (RNG.normal(size=(14, 7)) * np.exp(RNG.normal(size=(14, 1))) + RNG.normal(size=7)).astype(np.float32)
MEAN = VECTORS.mean(0)
QUERIES = RNG.normal(size=(3, 7)).astype(np.float32)
encode = jax.jit(sq.lvq_encode, static_argnums=(2, 3))
LEVELS = [(8, 0), (4, 0), (4, 4), (4, 8), (8, 8)]


def half(x):
    return float(np.float16(x))


def away(x):
    return np.floor(abs(x) + 0.5) * np.sign(x)


def by_definition(v, mean, bits, second):
    """One vector's step, bias, both rows of codes and what they stand for, an entry at a time in float64."""
    v = [float(np.float32(np.float32(a) - np.float32(m))) for a, m in zip(v, mean, strict=True)]
    top, low, high = 2**bits - 1, min(v), max(v)
    bias = half(low)
    step = half(np.float32(high - low) / np.float32(top)) if high - low > 7e-5 * top else 1.0
    codes = [min(max(away((x - bias) / step), 0), top) for x in v]
    decoded = [bias + step * c for c in codes]
    rest = None
    if second:
        fine = 2**second - 1
        rest = [min(max(away((x - d + step / 2) * fine / step), 0), fine) for x, d in zip(v, decoded, strict=True)]
        decoded = [d + r * step / fine - step / 2 for d, r in zip(decoded, rest, strict=True)]
    return step, bias, codes, rest, [d + float(m) for d, m in zip(decoded, mean, strict=True)]


def unpack(packed, bits, dim):
    """Half-byte codes by their definition: dimension j low in byte j, dimension ceil(d / 2) + j high in it."""
    packed = np.asarray(packed)
    if bits == 8:
        return packed
    width = -(-dim // 2)
    return np.stack([packed[:, j] % 16 if j < width else packed[:, j - width] // 16 for j in range(dim)], 1)


@pytest.mark.parametrize(("bits", "second"), LEVELS)
def test_codes_equal_the_definition(bits, second):
    found = encode(jnp.asarray(VECTORS), jnp.asarray(MEAN), bits, second)
    assert found.codes.dtype == jnp.uint8 and found.scale.dtype == found.bias.dtype == jnp.float16
    assert found.codes.shape == (14, 7 if bits == 8 else 4)
    assert second == 0 or found.residual.shape == (14, 7 if second == 8 else 4)
    decoded = sq.lvq_decode(found, jnp.asarray(MEAN))
    for i, v in enumerate(VECTORS):
        step, bias, codes, rest, expected = by_definition(v, MEAN, bits, second)
        assert float(found.scale[i]) == step and float(found.bias[i]) == bias
        np.testing.assert_array_equal(unpack(found.codes, bits, 7)[i], codes)
        if second:
            # a rounding at an exact half may fall either way in float32
            assert np.abs(unpack(found.residual, second, 7)[i].astype(int) - rest).max() <= 1
            assert np.mean(unpack(found.residual, second, 7)[i] != rest) <= 1 / 7
        np.testing.assert_allclose(decoded[i], expected, atol=1e-5 if not second else step / 10)


@pytest.mark.parametrize(("bits", "second"), [(8, 8), (4, 8), (4, 4)])
def test_released_codec_gives_the_same_codes(bits, second):
    name, x = f"{bits}{second}", GOLDEN["lvq_x"]
    found = encode(jnp.asarray(x), None, bits, second)
    np.testing.assert_array_equal(np.asarray(found.scale, np.float32), GOLDEN[f"lvq_scale_{name}"])
    np.testing.assert_array_equal(np.asarray(found.bias, np.float32), GOLDEN[f"lvq_bias_{name}"])
    codes = unpack(found.codes, bits, 9)
    np.testing.assert_array_equal(codes, GOLDEN[f"lvq_codes_{name}"])
    step = GOLDEN[f"lvq_scale_{name}"].astype(np.float64)[:, None]
    rest = x - (GOLDEN[f"lvq_bias_{name}"][:, None] + step * codes)
    level = (rest / step + 0.5) * (2**second - 1)
    tie = np.abs(level - np.floor(level) - 0.5) < 1e-3
    mine, theirs = unpack(found.residual, second, 9).astype(int), GOLDEN[f"lvq_residual_{name}"].astype(int)
    np.testing.assert_array_equal(mine[~tie], theirs[~tie])
    assert np.abs(mine - theirs).max() <= 1 and tie.mean() < 0.2


def test_error_bounds():
    for bits, second in LEVELS:
        kept = encode(jnp.asarray(VECTORS), jnp.asarray(MEAN), bits, second)
        error = np.abs(np.asarray(sq.lvq_decode(kept, jnp.asarray(MEAN))) - VECTORS).max(1)
        step = np.asarray(kept.scale, np.float32)
        span = np.ptp(VECTORS - MEAN, axis=1)
        slack = 2e-3 * span
        assert (error <= step / (2 * (2**second - 1) if second else 2) + slack).all()
        if second:
            # the bound that the released code's tests use
            assert (error <= span / ((2**bits - 1) * 2**second) + 1 / 8192 + slack).all()
        else:
            assert (error > step / 20).all()


def test_constant_vectors_and_shifts():
    constant = jnp.asarray(np.array([[1.5] * 5, [0.0] * 5, [-3.25] * 5], np.float32))
    for bits, second in LEVELS:
        kept = encode(constant, None, bits, second)
        np.testing.assert_array_equal(kept.scale, 1)
        np.testing.assert_allclose(sq.lvq_decode(kept), constant, atol=1e-6 if not second else 1 / 15)
    almost = jnp.asarray([[1.0, 1.0 + 7e-5 * 255 * 0.9], [1.0, 1.0 + 7e-5 * 255 * 1.1]], jnp.float32)
    np.testing.assert_array_equal(np.asarray(encode(almost, None, 8, 0).scale) == 1, [True, False])
    # powers of two pass through float16 unchanged: a scale moves constants, not codes
    base = jnp.asarray(np.array([[-1.0, 0.5, 0.25, 3.0]], np.float32))
    one, two, moved = (encode(x, None, 8, 0) for x in (base, 2 * base, base + 4))
    np.testing.assert_array_equal(two.codes, one.codes)
    np.testing.assert_array_equal(moved.codes, one.codes)
    np.testing.assert_array_equal([two.scale, two.bias], [2 * one.scale, 2 * one.bias])
    np.testing.assert_array_equal([moved.scale, moved.bias], [one.scale, one.bias + 4])
    # halves go away from zero
    halves = jnp.asarray([[0.0, 255.0, 0.5, 1.5, 2.5]], jnp.float32)
    np.testing.assert_array_equal(encode(halves, None, 8, 0).codes, [[0, 255, 1, 2, 3]])
    # a minimum that float16 rounds up leaves entries below it: they are clipped, not wrapped round
    low = jnp.asarray([[1.0004, 1.0 + 20, 3.0]], jnp.float32)
    assert float(np.float16(1.0004)) < 1.0004 or int(encode(low, None, 8, 0).codes[0, 0]) == 0
    assert int(encode(jnp.asarray([[2049.0, 2049.6, 2060.0]], jnp.float32), None, 8, 0).codes[0, 0]) < 60


@pytest.mark.parametrize(("bits", "second"), LEVELS)
@pytest.mark.parametrize("with_mean", [False, True])
def test_scores_come_from_codes(bits, second, with_mean):
    mean = jnp.asarray(MEAN) if with_mean else None
    kept = encode(jnp.asarray(VECTORS), mean, bits, second)
    decoded = np.asarray(sq.lvq_decode(kept, mean), np.float64)
    products = jax.jit(sq.lvq_inner_product)(jnp.asarray(QUERIES), kept, mean)
    np.testing.assert_allclose(products, QUERIES @ decoded.T, atol=1e-4)
    distances = jax.jit(sq.lvq_squared_distance)(jnp.asarray(QUERIES), kept, mean)
    np.testing.assert_allclose(distances, ((QUERIES[:, None] - decoded) ** 2).sum(-1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("encoding", sq.ENCODINGS)
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_rows_of_every_encoding_score_alike(encoding, metric):
    rows = sq.encode_rows(jnp.asarray(VECTORS), encoding, jnp.asarray(MEAN))
    prepared = sq.prepare_queries(jnp.asarray(QUERIES), jnp.asarray(MEAN), metric)
    found = sq.row_scores(prepared, rows, metric)
    expected = QUERIES @ VECTORS.T if metric == "ip" else -((QUERIES[:, None] - VECTORS) ** 2).sum(-1)
    # float32 has nothing to lose; the rest lose what their steps say
    loose = {"float32": 1e-5, "float16": 2e-3, "lvq8": 4e-3, "lvq8x8": 5e-3, "bfloat16": 2e-2, "lvq4x8": 5e-3}
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=loose.get(encoding, 0.1 if encoding == "lvq4" else 0.02) * scale)
    assert found.dtype == jnp.float32
    sizes = {"float32": 28, "bfloat16": 14, "float16": 14, "lvq8": 11, "lvq4": 8, "lvq4x4": 12, "lvq4x8": 15,
             "lvq8x8": 18}  # fmt: skip
    assert sq.bytes_per_row(rows) == sizes[encoding]


def test_distances_are_never_negative():
    rows = sq.encode_rows(jnp.asarray(VECTORS), "float32", jnp.asarray(MEAN))
    itself = sq.prepare_queries(jnp.asarray(VECTORS), jnp.asarray(MEAN), "l2")
    assert (np.asarray(sq.row_scores(itself, rows, "l2")) <= 0).all()
    codes = sq.lvq_encode(jnp.asarray(VECTORS))
    assert (np.asarray(sq.lvq_squared_distance(sq.lvq_decode(codes), codes)) >= 0).all()


def test_wrong_input_is_named():
    x = jnp.asarray(VECTORS)
    for bits, second in ((3, 0), (16, 0), (8, 2)):
        with pytest.raises(ValueError, match=f"bits must be 4 or 8.*got {bits} and {second}"):
            sq.lvq_encode(x, None, bits, second)
    with pytest.raises(ValueError, match="encoding must be one of float32, .*; got 'int8'"):
        sq.encode_rows(x, "int8")
    with pytest.raises(ValueError, match="queries have D=6, database D=7"):
        sq.lvq_inner_product(jnp.zeros((2, 6)), sq.lvq_encode(x))
    with pytest.raises(ValueError, match="queries have D=6, database D=7"):
        sq.prepare_queries(jnp.zeros((2, 6)), jnp.zeros(7))
    with pytest.raises(ValueError, match="metric must be 'ip' or 'l2', got 'dot'"):
        sq.prepare_queries(jnp.zeros((2, 7)), jnp.zeros(7), "dot")
    bad = VECTORS.copy()
    bad[3, 2], bad[5, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"row 3 of database is not finite \(2 such\)"):
        sq.check_vectors(bad)
    with pytest.raises(ValueError, match=r"queries must be \[n, D\] with at least one row, got \[0, 7\]"):
        sq.check_vectors(VECTORS[:0], what="queries")
    with pytest.raises(ValueError, match="queries have D=7, database D=9"):
        sq.check_vectors(VECTORS, 9, "queries")
    sq.check_vectors(VECTORS, 7)
    sq.check_range(VECTORS, 8)
    sq.check_range(np.ones((2, 4)), 8)
    with pytest.raises(ValueError, match="row 1 of vectors runs from 0 to 1e.08.*scale the vectors down"):
        sq.check_range(np.array([[0, 1.0], [0, 1e8]]), 8)
    with pytest.raises(ValueError, match="row 0 of vectors runs from -7e.04.*scale the vectors down"):
        sq.check_range(np.array([[-7e4, 1.0], [0, 1.0]]), 8)
    with pytest.raises(ValueError, match=r"row 1 of x spans only 0.01 \(1 such\): with 8 bits.*scale the vectors up"):
        sq.check_range(np.array([[0, 1.0], [0, 0.01]]), 8, "x")
    sq.check_range(np.array([[0, 1.0], [0, 0.01]]), 4)
