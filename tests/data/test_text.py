"""Tokenizers trained on the fly, BM25 against its formula, latent word vectors, and the synonym language."""

import math

import numpy as np
import pytest

from data import bm25
from data.lsa import latent_semantic_words
from data.stream import DataError
from data.synonym_text import synonym_collection
from data.text import SPECIAL, Tokenizer

TEXTS = ["The flow over a wing.", "heat flow in a wing at high speed", "Über heat"]


@pytest.fixture(scope="module", params=["wordpiece", "byte"])
def tokenizer(request):
    return Tokenizer.train(TEXTS, 300, request.param, special=("[Decode]",))


def test_rows_of_ids(tokenizer):
    assert [tokenizer.id_of(t) for t in SPECIAL] == [0, 1, 2, 3, 4] and tokenizer.id_of("[Decode]") == 5
    rows = tokenizer.encode(TEXTS, 9)
    assert rows.shape == (3, 9) and rows.dtype == np.int32 and rows.max() < tokenizer.vocab_size
    for text, row in zip(TEXTS, rows, strict=True):
        own = tokenizer.ids(text)[:7]
        assert row.tolist() == [2, *own, 3, *[0] * (7 - len(own))]
    assert tokenizer.encode(["wing"], 5, start="[Decode]")[0, 0] == 5
    assert tokenizer.texts([tokenizer.ids("heat flow")]) == ["heat flow"]


def test_pairs(tokenizer):
    ids, types = tokenizer.encode_pairs(["wing flow at"], ["heat"], 4, 3)
    a, b = tokenizer.ids("wing flow at")[:2], tokenizer.ids("heat")[:2]
    assert ids[0].tolist()[: 3 + len(a) + len(b)] == [2, *a, 3, *b, 3] and ids.shape == (1, 7)
    assert types[0].tolist() == [*[0] * (2 + len(a)), *[1] * (len(b) + 1), *[0] * (4 - len(a) - len(b))]


def test_written_and_read_again(tokenizer, tmp_path):
    tokenizer.write(tmp_path / "tokenizer.json")
    again = Tokenizer.read(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(again.encode(TEXTS, 12), tokenizer.encode(TEXTS, 12))
    assert (again.pad, again.cls, again.sep) == (0, 2, 3)


def test_a_byte_tokenizer_knows_every_text():
    t = Tokenizer.train(["abc"], 300, "byte")
    assert t.texts([t.ids("zażółć 🙂")]) == ["zażółć 🙂"]


def test_tokenizers_refuse(tmp_path):
    for arguments, says in (
        ((["a"], 300, "letters"), "kind of tokenizer must be 'wordpiece' or 'byte', got 'letters'"),
        (([" "], 300), "without any text"),
        ((["a"], 5), "vocab_size must be at least 6 .* got 5"),
        ((["a"], 100, "byte"), "vocab_size must be at least 261"),
    ):
        with pytest.raises(DataError, match=says):
            Tokenizer.train(*arguments)
    t = Tokenizer.train(TEXTS, 100)
    with pytest.raises(DataError, match=r"no token '\[X\]'; train it with special"):
        t.id_of("[X]")
    with pytest.raises(DataError, match="at least 3 tokens, got length 2"):
        t.encode(TEXTS, 2)
    with pytest.raises(DataError, match="lengths must be at least 3 and 2"):
        t.encode_pairs(TEXTS, TEXTS, 2, 2)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(DataError, match=r"t.json: cannot be read as a tokenizer.json"):
        Tokenizer.read(tmp_path / "t.json")


# --- BM25 -------------------------------------------------------------------------------------------------------------


def test_stems_and_words():
    assert [bm25.s_stem(w) for w in ("bodies", "wings", "waves", "gas", "class", "status", "shoes", "is")] == [
        "body", "wing", "wave", "ga", "class", "status", "shoe", "is"
    ]  # fmt: skip
    assert bm25.words("The Wings, of 2 BODIES!") == ["wing", "2", "body"]


def test_bm25_is_its_formula():
    documents = ["wing wing flow", "flow heat", "speed of heat heat heat wing", "nothing"]
    k1, b = 1.2, 0.75
    index = bm25.BM25(documents, k1, b)
    bags = [bm25.words(d) for d in documents]
    mean = sum(map(len, bags)) / 4

    def score(query, bag):
        total = 0.0
        for w in bm25.words(query):
            n, tf = sum(w in x for x in bags), bag.count(w)
            idf = math.log(1 + (4 - n + 0.5) / (n + 0.5))
            total += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(bag) / mean))
        return total

    for query in ("wings heat", "heat heat", "unknown"):
        np.testing.assert_allclose(index.scores(query), [score(query, x) for x in bags], rtol=1e-12)
    values, ids = index.search(["wing", "unknown"], 3)
    assert ids.tolist() == [[0, 2, -1], [-1, -1, -1]] and values[0, 2] == -np.inf
    assert values[0, 0] == pytest.approx(index.scores("wing")[0])


def test_bm25_breaks_ties_by_number_and_refuses():
    assert bm25.BM25(["x a", "x b", "x c"]).search(["x"], 3)[1].tolist() == [[0, 1, 2]]
    with pytest.raises(DataError, match="at least one document"):
        bm25.BM25([])
    with pytest.raises(DataError, match=r"k1 >= 0 and b in \[0, 1\]; got k1 1, b 2"):
        bm25.BM25(["x"], 1, 2)
    with pytest.raises(DataError, match=r"k must be in \[1, 1\]"):
        bm25.BM25(["x"]).search(["x"], 2)


# --- latent words and the language of synonyms ------------------------------------------------------------------------


def test_latent_words_are_singular_vectors():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 12, (30, 8))
    vectors, idf = latent_semantic_words(ids, 13, 6)
    counts = np.array([[(row == w).sum() for w in range(13)] for row in ids], float)
    counts[:, :5] = 0
    want = np.where(counts.any(0), np.log(31 / ((counts > 0).sum(0) + 1)), 0)
    np.testing.assert_allclose(idf, want, rtol=1e-6)
    matrix = np.log1p(counts) * want
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)
    exact = np.linalg.svd(matrix)[2][:6]
    np.testing.assert_allclose(np.abs(vectors.T), np.abs(exact), atol=1e-5)
    assert not vectors[:5].any() and not vectors[12].any() and idf[12] == 0
    with pytest.raises(DataError, match=r"features must be in \[1, 13\] for 30 documents, got 14"):
        latent_semantic_words(ids, 13, 14)


def test_synonyms():
    found = synonym_collection(3, documents=50, train=60, test=20, mismatch=1.0)
    again = synonym_collection(3, documents=50, train=60, test=20, mismatch=1.0)
    assert found.fingerprint == again.fingerprint != synonym_collection(4, 50, 60, 20).fingerprint
    assert len(found.documents) == 50 and found.splits["test"].tolist() == list(range(60, 80))
    shared = [
        set(found.queries[q].split()) & set(found.texts[d].split())
        for q, d in zip(found.judgements.query, found.judgements.document, strict=True)
    ]
    assert not any(shared)  # every query word is another word than the document's
    same = synonym_collection(3, documents=50, train=60, test=20, mismatch=0.0)
    assert all(
        set(same.queries[q].split()) <= set(same.texts[d].split())
        for q, d in zip(same.judgements.query, same.judgements.document, strict=True)
    )
    with pytest.raises(DataError, match="mismatch is a probability, got 2"):
        synonym_collection(mismatch=2)
    with pytest.raises(DataError, match="positive sizes, 2 synonyms"):
        synonym_collection(synonyms=1)
