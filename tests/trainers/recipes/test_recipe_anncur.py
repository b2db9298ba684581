"""anncur's recipe: its runs on matrices, pairs and texts, what they leave, its claim's arms, and what it refuses."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.model import load_model
from data.collections import read_collection
from data.stream import DataError
from data.text import Tokenizer
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.retrieval import anncur as recipe
from trainers.run import train
from trainers.token_pairs import TAGS, generated_pairs, texts_as_pairs
from zoo.nn.cross_encoder import CrossEncoder, join_pairs
from zoo.retrieval import anncur

SMALL = {"anchor_queries": 12, "anchor_items": 5, "num_rerank": 8, "k": 3, "test_queries": 6}
TINY = {**SMALL, "width": 16, "depth": 1, "train_steps": 4, "batch_size": 8, "negatives": 4, "block": 8}


def run(into, **change):
    return train("anncur", recipe.Recipe(**change), into, Settings(Parallel(devices=1)), progress=False)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """A score matrix of rank 4 on disk: 5 anchors suffice."""
    file = tmp_path_factory.mktemp("scores") / "scores.npy"
    rng = np.random.default_rng(0)
    np.save(file, (rng.normal(size=(30, 4)) @ rng.normal(size=(4, 40))).astype(np.float32))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BEIR folder."""
    root = tmp_path_factory.mktemp("beir")
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(60)]
    texts = [" ".join(rng.choice(words, 8)) for _ in range(30)]
    rows = [{"_id": f"d{i}", "title": " ".join(t.split()[:2]), "text": t} for i, t in enumerate(texts)]
    (root / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [{"_id": f"q{i}", "text": " ".join(texts[i % 30].split()[2:6])} for i in range(24)]
    (root / "queries.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (root / "qrels").mkdir()
    for split, ids in (("train", range(16)), ("test", range(16, 24))):
        (root / "qrels" / f"{split}.tsv").write_text("\n".join(f"q{i}\td{i % 30}\t1" for i in ids))
    return root


def test_a_matrix_of_ones_own(matrix, tmp_path):
    names = tmp_path / "items.txt"
    names.write_text("\n".join(f"item {i}" for i in range(40)))
    done = run(tmp_path / "run", data=Data(path=str(matrix)), items=str(names), **SMALL)
    metrics = done["metrics"]
    assert metrics["matrix_search/recall"] == 1 and metrics["matrix_search/scorer_calls_per_query"] == 13
    assert metrics["matrix_search/relative_error"] < 1e-3 and metrics["matrix_index/bytes_per_item"] == 20
    assert done["summary"].startswith(
        "score matrix: 1.000 of the exact top items found by 13 calls a query instead of 40"
    )
    assert (tmp_path / "run" / "recall.png").stat().st_size > 5000
    model = load_model(tmp_path / "run" / "model")
    assert model.definition == anncur.CURConfig(12, 5)
    kept = model.variables["index"]
    index = anncur.CURIndex(jnp.asarray(kept["items"]), jnp.asarray(kept["anchors"]))
    m = np.load(matrix)
    np.testing.assert_allclose(anncur.cur_scores(jnp.asarray(m[:, kept["anchors"]]), index), m, atol=1e-3)
    # anchor queries and the queries that are searched for are different ones
    split = recipe.Recipe(**SMALL)._split(30, 40, 29, "")
    assert [len(x) for x in split] == [12, 6] and not set(split[0]) & set(split[1])


@pytest.mark.slow
def test_generated_pairs_are_learnt_and_searched_with_counted_calls(tmp_path):
    done = run(tmp_path, data=Data("pairs"), **{**TINY, "embeddings": "bfloat16"})
    metrics = done["metrics"]
    assert metrics["live_search/scorer_calls_per_query"] == 13 and metrics["rows_0/scorer_calls"] == 8 * 500
    assert metrics["rows_1/scorer_calls"] == 4 * 500 and metrics["live_index/bytes_per_item"] == 10
    model = load_model(tmp_path / "model")
    assert isinstance(model.definition, CrossEncoder) and model.definition.head == "emb"
    # the model and the rows on disk agree, and so does the index
    pairs = generated_pairs(0)
    rows = np.concatenate([np.load(tmp_path / "artefacts" / f"rows_{i}" / f"rows_{i}.npz")[
        np.load(tmp_path / "artefacts" / f"rows_{i}" / f"rows_{i}.npz").files[0]] for i in range(2)])  # fmt: skip
    anchors = np.sort(np.random.default_rng(0).permutation(2000)[:12])
    ids = join_pairs(jnp.asarray(pairs.train[anchors[9:10]].repeat(20, 0)), jnp.asarray(pairs.items[100:120]))
    found = model.definition.apply({"params": model.variables["params"]}, *ids)["scores"]
    np.testing.assert_allclose(found, rows[9, 100:120], atol=1e-4)
    index = anncur.cur_fit(jnp.asarray(rows), jnp.asarray(model.variables["index"]["anchors"]))
    np.testing.assert_allclose(model.variables["index"]["items"], index.item_embeddings, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_texts_train_a_cross_encoder(folder, tmp_path):
    done = run(tmp_path, data=Data(path=str(folder)), head="cls", loss="bce", **{**TINY, "vocab_size": 300})
    assert done["metrics"]["live_search/scorer_calls_per_query"] == 13
    model = load_model(tmp_path / "model")
    assert model.tokenizer().token_to_id("[TITLE]") is not None


def test_texts_become_pairs(folder):
    collection = read_collection(folder)
    tokenizer = Tokenizer.train(collection.documents, 300, special=TAGS)
    pairs = texts_as_pairs(collection, tokenizer, 8, 12)
    start, end, title = pairs.tags
    asked, head = tokenizer.ids(collection.queries[3]), tokenizer.ids(collection.titles[4])
    wanted = [tokenizer.cls, start, *asked[:4], end, tokenizer.sep]
    assert pairs.train.shape == (16, 8) and pairs.train[3].tolist()[: len(wanted)] == wanted
    body = tokenizer.ids(collection.texts[4])
    wanted = [*head, title, *body][:11]
    assert pairs.items[4].tolist()[: len(wanted) + 1] == [*wanted, tokenizer.sep]
    assert pairs.test.shape == (8, 8) and pairs.relevant[:, 0].tolist() == list(range(16))
    rng = np.random.default_rng(0)
    drawn = pairs.candidates(6, rng)
    assert drawn.shape == (16, 7) and (drawn[:, 0] == pairs.relevant[:, 0]).all()
    assert not (drawn[:, 1:] == pairs.relevant[:, :1]).any() and (drawn[:, 1:] >= -1).all()
    # half of the negatives are another retriever's, where it found any
    near = dataclasses.replace(pairs, hard=np.where(np.arange(16)[:, None] == 2, -1, np.array([[20, 21, 22]])))
    half = near.candidates(6, rng)[:, 1:4]
    assert np.isin(half[np.arange(16) != 2], [20, 21, 22]).all() and not np.isin(half[2], [20, 21, 22]).all()
    assert len(np.unique(near.candidates(7, rng)[:, 4:])) > 10
    with pytest.raises(
        UserError, match=r"exactly one title tag, found 0 \(row 0\); the text has \d+ tokens and is cut"
    ):
        texts_as_pairs(collection, tokenizer, 8, 3)
    with pytest.raises(UserError, match="--query-length and --item-length must be at least 5 and 3, got 4, 9"):
        texts_as_pairs(collection, tokenizer, 4, 9)
    collection.texts[2] = "w1 [TITLE] w2"
    with pytest.raises(UserError, match=r"item text must contain exactly one title tag, found 2 \(row 2\)"):
        texts_as_pairs(collection, tokenizer, 8, 40)


def test_arms():
    found = {a: recipe.arm(a, 0) for a in ("cur", "rank-limited dual encoder", "item mean", "random candidates")}
    for name in ("recall_10_at_50_calls", "recall_50_at_120_calls"):
        rows = [found[a][name] for a in found]
        assert rows[0] > rows[1] > rows[2] + 0.3 and rows[3] < 0.1
    with pytest.raises(UserError, match="unknown arm 'best'"):
        recipe.arm("best", 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 60}, "asked for top-60 but only 30 items are re-ranked: raise --num-rerank"),
        ({"k": 0}, "--k must be at least 1, got 0"),
        ({"anchor_items": 3001}, "--anchor-items 3001 is more than the 3000 items there are"),
        ({"num_rerank": 3001}, "--num-rerank 3001 is more than the 3000 items"),
        ({"anchor_queries": 300}, "--anchor-queries 300 is more than 299, the queries of the matrix less one"),
        ({"rcond": -1.0}, "--rcond must not be negative"),
        ({"rcond": 1.0}, "--rcond must be below 1"),
        ({"ridge": float("nan")}, "--ridge must not be negative, got nan"),
        ({"width": 20}, "--width must be a positive multiple of 16"),
        ({"negatives": 0}, "--negatives must be at least 1"),
        ({"items": "names.txt"}, "--items names.txt names the items of a score matrix: give --data.path FILE.npy"),
        ({"data": Data("zeshel")}, "--data.name 'zeshel' is unknown; use standin, matrix or pairs"),
    ],
)
def test_impossible_settings_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        recipe.Recipe(**change).build()


def test_bad_files_are_refused(tmp_path, matrix):
    with pytest.raises(DataError, match="nowhere.npy: cannot be read as .npy"):
        recipe.Recipe(data=Data(path=str(tmp_path / "nowhere.npy"))).build()
    with pytest.raises(DataError, match="holds neither corpus.jsonl"):
        recipe.Recipe(data=Data(path=str(tmp_path))).build()
    (tmp_path / "items.txt").write_text("one\n")
    with pytest.raises(DataError, match="has 40 items, but .*items.txt lists 1"):
        recipe.Recipe(data=Data(path=str(matrix)), items=str(tmp_path / "items.txt"), **SMALL).build()


@pytest.mark.claim
def test_the_claim():
    import zoo
    from trainers.claims import run_claim

    found = run_claim(zoo.card("anncur"), 5)
    assert found["verdict"] == "confirmed", json.dumps(found["paired"])
