"""Profiles, statistics and similarities of columns: by hand, by loops, the released code's numbers, files."""

import collections
import math
from pathlib import Path

import numpy as np
import pytest

from data.stream import DataError
from data.table_profiles import (
    CHARACTERS,
    NUM_FEATURES,
    RELATIONS,
    blocked_pairs,
    column_features,
    column_profile,
    hashed_ngrams,
    hashes,
    minhash,
    normalise,
    normalised_features,
    pairwise_similarities,
    read_vectors,
    tokens_of,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "omnimatch_official.npz")
COLUMNS = [list(c) for c in GOLDEN["columns"]]
PAIRS = np.array([(i, j) for i in range(5) for j in range(i + 1, 5)])


def similarity(a, b, vectors=None, **rest):
    profiles = [column_profile(a, vectors), column_profile(b, vectors)]
    found = pairwise_similarities(profiles, np.array([[0, 1], [1, 0]]), **rest)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    return dict(zip(RELATIONS, found[0].tolist(), strict=True))


def test_values_and_tokens():
    assert [normalise(v) for v in ("Ab.0", "3.0", "3.00", "x.0.0", "10")] == ["ab", "3", "3.00", "x.0", "10"]
    assert tokens_of("Elm-Road, 12é3_x") == ["Elm", "Road", "12", "3", "x"] and tokens_of("--") == []


def test_set_similarities_by_hand():
    found = similarity(["A", "b", "b", "c.0", None, "d"], ["a", "C", "e"])
    assert found["jaccard"] == pytest.approx(2 / 5) and found["containment"] == pytest.approx(2 / 3)
    # road occurs four times, elm three, 7 twice: kept are 12; elm; elm; 7; oak; and of the tied pair its first
    left, right = (
        ["elm 12", "elm road", "elm road", "road 7 7", "oak", "road", "fir ash"],
        ["12", "oak ash", "oak", "--"],
    )
    profile = column_profile(left)
    np.testing.assert_array_equal(profile.rare, np.sort(hashes(["12", "elm", "7", "oak", "road", "fir"])))
    counts = dict(zip(profile.tokens.tolist(), profile.counts.tolist(), strict=True))
    expected = zip(hashes(["elm", "road", "12", "7", "oak", "fir", "ash"]).tolist(), [3, 4, 1, 2, 1, 1, 1], strict=True)
    assert counts == dict(expected)
    # on the right: 12, ash (rarer than oak), oak; 12 and oak are in both
    assert similarity(left, right)["infrequent_jaccard"] == pytest.approx(2 / 7)
    empty = similarity(["x"], [None])
    assert [empty[k] for k in ("jaccard", "containment", "infrequent_jaccard", "embedding")] == [0, 0, 0, 0]
    assert empty["distribution"] == pytest.approx(1 - math.log(2))


def test_distributions_by_hand():
    assert similarity(["a b", "a"], ["A", "b a"])["distribution"] == pytest.approx(1)
    assert similarity(["a"], ["b"])["distribution"] == pytest.approx(1 - math.log(2))
    p, q = {"a": 3 / 4, "b": 1 / 4}, {"a": 1 / 2, "c": 1 / 2}
    js = 0.0
    for t in "abc":
        m = (p.get(t, 0) + q.get(t, 0)) / 2
        js += 0.5 * sum(x[t] * math.log(x[t] / m) for x in (p, q) if t in x)
    assert similarity(["a", "a", "a", "b"], ["a", "c"])["distribution"] == pytest.approx(1 - js)


def test_embeddings_are_means_over_distinct_most_frequent_tokens():
    table = {"elm": [1.0, 0.0], "road": [0.0, 1.0], "oak": [3.0, 4.0], "ash": [-1.0, 0.0]}
    vectors = lambda t: np.array(table[t]) if t in table else None  # noqa: E731
    # road is in both values and kept once for each; oak is in one
    profile = column_profile(["elm road", "road", "oak", "birch"], vectors)
    np.testing.assert_allclose(profile.embedding, [1.5, 2.5])
    found = similarity(["elm", "elm oak"], ["ash"], vectors)["embedding"]
    assert found == pytest.approx(-1)
    assert column_profile(["birch"], vectors).embedding is None
    assert similarity(["birch"], ["elm"], vectors)["embedding"] == 0


def test_hashed_ngrams_know_spellings():
    vector = hashed_ngrams(50)
    np.testing.assert_array_equal(vector("maple"), hashed_ngrams(50)("maple"))
    cosine = lambda a, b: vector(a) @ vector(b) / np.linalg.norm(vector(a)) / np.linalg.norm(vector(b))  # noqa: E731
    assert cosine("mapleton", "mapletom") > 0.4 > abs(cosine("mapleton", "granite")) and len(vector("a")) == 50


def test_similarities_equal_the_released_codes():
    profiles = [column_profile(c) for c in COLUMNS]
    found = dict(zip(RELATIONS, pairwise_similarities(profiles, PAIRS).T, strict=True))
    for mine, theirs in (("jaccard", "jaccard"), ("containment", "containment"), ("infrequent_jaccard", "rare")):
        np.testing.assert_allclose(found[mine], GOLDEN[f"sim/{theirs}"], atol=1e-6)
    np.testing.assert_allclose(found["distribution"], GOLDEN["sim/js"], atol=1e-6)


def test_similarities_equal_plain_sets_on_random_columns():
    rng = np.random.default_rng(0)
    columns = [[f"w{v}" for v in rng.integers(0, 30, rng.integers(1, 40))] for _ in range(6)]
    pairs = np.array([(i, j) for i in range(6) for j in range(i + 1, 6)])
    found = pairwise_similarities([column_profile(c) for c in columns], pairs)
    for row, (u, v) in zip(found, pairs, strict=True):
        a, b = set(columns[u]), set(columns[v])
        assert row[3] == pytest.approx(len(a & b) / len(a | b))
        assert row[4] == pytest.approx(max(len(a & b) / len(a), len(a & b) / len(b)))
        p, q = (collections.Counter(columns[i]) for i in (u, v))
        js = 0.0
        for t in a | b:
            x, y = p[t] / len(columns[u]), q[t] / len(columns[v])
            js += 0.5 * sum(z * math.log(2 * z / (x + y)) for z in (x, y) if z)
        assert row[2] == pytest.approx(1 - js, abs=1e-6)


def test_minhash_estimates():
    a, b = [f"v{i}" for i in range(400)], [f"v{i}" for i in range(200, 700)]
    exact, near = similarity(a, b), similarity(a, b, method="minhash", num_hashes=1024)
    for name, tolerance in (("jaccard", 0.05), ("containment", 0.09), ("infrequent_jaccard", 0.05)):
        assert near[name] == pytest.approx(exact[name], abs=tolerance)
    assert near["distribution"] == exact["distribution"] and near["embedding"] == exact["embedding"]
    assert similarity(a, a, method="minhash")["containment"] == 1
    assert similarity(a, [None], method="minhash")["jaccard"] == 0
    assert len(set(minhash(column_profile(a).values, 64).tolist())) == 64


def test_blocking_keeps_pairs_that_share_something():
    columns = [["x", "y"], ["y q"], ["x"], ["q"], ["z"]]
    profiles = [column_profile(c) for c in columns]
    # y and q are rare tokens of column 1 (y first); 0 and 2 share x but one table
    assert blocked_pairs(profiles, np.array([0, 1, 0, 2, 2])).tolist() == [[0, 1]]
    assert blocked_pairs(profiles, np.array([0, 1, 2, 3, 4])).tolist() == [[0, 1], [0, 2]]
    with pytest.warns(UserWarning, match="no two columns of different tables share a value"):
        assert blocked_pairs(profiles, np.zeros(5, int)).shape == (0, 2)
    with pytest.warns(UserWarning, match="share a value"):
        blocked_pairs(profiles, np.arange(5), limit=1)


def aggregates(x):
    """Ten aggregates by the definition."""
    n, mean = len(x), sum(x) / len(x)
    m = [sum((v - mean) ** k for v in x) / n for k in (2, 3, 4)]
    s = sorted(x)
    median = (s[(n - 1) // 2] + s[n // 2]) / 2
    kurtosis = m[2] / m[0] ** 2 - 3 if m[0] else -3
    skewness = m[1] / m[0] ** 1.5 if m[0] else 0
    return [any(x), all(x), mean, m[0], min(x), max(x), median, sum(x), kurtosis, skewness]


def test_statistics_by_the_definition():
    cells = ["Ab 1", None, "b[]!", "Ab 1", "22 3 4"]
    values = [c for c in cells if c is not None]
    found = column_features(cells)
    assert found.shape == (987,) == (NUM_FEATURES,) and len(CHARACTERS) == 96 == len(set(CHARACTERS))
    for i, c in enumerate(CHARACTERS):
        np.testing.assert_allclose(found[10 * i : 10 * i + 10], aggregates([v.count(c) for v in values]), err_msg=c)
    share = [0.5, 0.25, 0.25]
    expected = [-sum(p * math.log2(p) for p in share), 3 / 5, 3 / 5, 3 / 5]
    for row in ([1, 0, 1, 4], [2, 1, 2, 0], [0, 3, 0, 0], [2, 1, 2, 3]):
        expected += [np.mean(row), np.std(row)]
    np.testing.assert_allclose(found[960:972], expected)
    np.testing.assert_allclose(found[972:], [5, *aggregates([4, 4, 4, 6]), 1, 0.2, 1, 0])


def test_statistics_equal_the_released_codes_but_for_nan():
    for column, theirs in zip(COLUMNS, GOLDEN["features"], strict=True):
        known = ~np.isnan(theirs)
        found = column_features(column, "official")
        np.testing.assert_allclose(found[known], theirs[known], rtol=1e-6, atol=1e-9)
        assert set(found[~known].tolist()) <= {0.0, -3.0}
        differ = np.flatnonzero(~np.isclose(column_features(column), found))
        assert set(differ.tolist()) <= {968, 969, 970, 971}
    assert len(np.flatnonzero(column_features(COLUMNS[2]) != column_features(COLUMNS[2], "official"))) == 4


def test_columns_without_values_and_odd_characters():
    found = column_features([None, None])
    assert found.shape == (987,) and found[972] == 2 and found[-4:].tolist() == [1, 1, 2, 1]
    assert not found[:972].any() and not found[973:983].any()
    assert np.isfinite(column_features([])).all() and column_features([])[-1] == 0
    np.testing.assert_allclose(column_features(["é☃a"])[973 + 2], 3)
    assert column_features(["é☃a"])[CHARACTERS.index("a") * 10 + 7] == 1


def test_features_are_scaled_over_the_columns():
    found = normalised_features([["a", "bb"], ["a!"], [None]])
    norms = np.linalg.norm(found, axis=0)
    assert found.dtype == np.float32 and np.all(np.isclose(norms, 1, atol=1e-5) | (norms == 0))
    raw = np.stack([column_features(c) for c in (["a", "bb"], ["a!"], [None])])
    np.testing.assert_allclose(found[:, 2], raw[:, 2] / max(np.linalg.norm(raw[:, 2]), 1e-12))


def test_word_vectors_are_read(tmp_path):
    file = tmp_path / "v.vec"
    file.write_text("3 2\nelm 1 2\nroad 0.5 -1 \nelm 9 9\n")
    vectors = read_vectors(file)
    np.testing.assert_allclose(vectors("elm"), [1, 2])
    np.testing.assert_allclose(vectors("road"), [0.5, -1])
    assert vectors("oak") is None
    file.write_text("elm 1\nroad 2\n")
    np.testing.assert_allclose(read_vectors(file)("elm"), [1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no word vector"),
        ("2 3\nelm 1 2 3\nroad 1 2\n", "line 3: 2 numbers, expected 3"),
        ("elm 1 2\nroad 1 x\n", "line 2: not a number"),
        ("elm\n", "line 1: 0 numbers, expected some"),
    ],
)
def test_bad_word_vectors(tmp_path, text, message):
    (tmp_path / "v.vec").write_text(text)
    with pytest.raises(DataError, match=message):
        read_vectors(tmp_path / "v.vec")
    with pytest.raises(DataError, match="cannot be read as word vectors"):
        read_vectors(tmp_path / "none.vec")


def test_vectors_of_two_widths_are_refused():
    profiles = [column_profile(["a"], hashed_ngrams(4)), column_profile(["a"], hashed_ngrams(5))]
    with pytest.raises(DataError, match=r"token vectors have different widths \[4, 5\]"):
        pairwise_similarities(profiles, np.array([[0, 1]]))
