"""lol's recipe: its run and what it leaves, a user's own files and backbone, its claim's arms, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.model import load_model, save_model
from data.stream import DataError
from data.text import Tokenizer
from trainers.feedback import measurement
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.retrieval import lol as recipe
from trainers.retrieval import text_collection
from trainers.run import train
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.partitioning import unbox
from zoo.retrieval import lol

TINY = {"width": 8, "vocab_size": 400, "passage_length": 8, "query_length": 8, "max_length": 30, "steps": 4,
        "hidden": 4, "batch_size": 8, "k_max": 3, "depth": 1}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BEIR folder, with a run and document vectors beside it."""
    root = tmp_path_factory.mktemp("beir")
    made = text_collection(Data("synonyms"), 1)
    (root / "qrels").mkdir()
    rows = [json.dumps({"_id": i, "text": t}) for i, t in zip(made.document_ids, made.texts, strict=True)][:60]
    (root / "corpus.jsonl").write_text("\n".join(rows))
    pairs = [(q, d) for q, d in zip(made.judgements.query, made.judgements.document, strict=True) if d < 60][:50]
    asked = [json.dumps({"_id": f"q{q}", "text": made.queries[q]}) for q, _ in pairs]
    (root / "queries.jsonl").write_text("\n".join(asked))
    for split, part in (("train", pairs[:35]), ("test", pairs[35:])):
        (root / "qrels" / f"{split}.tsv").write_text("\n".join(f"q{q}\td{d}\t1" for q, d in part))
    run = [f"q{q}\td{(d + 7 * j) % 60}\t{j}" for q, d in pairs for j in (2, 1, 3)]
    (root / "run.tsv").write_text("\n".join(run))
    np.save(root / "m.npy", np.random.default_rng(0).normal(size=(60, 6)))
    (root / "ids.txt").write_text("\n".join(f"d{i}" for i in range(60)))
    return root


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A whole run over vectors."""
    work = tmp_path_factory.mktemp("run")
    made = recipe.Recipe(data=Data("beir", str(folder)), **TINY)
    return made, train("lol", made, work, Settings(Parallel(devices=1)), progress=False), work


def test_a_run_measures_both_trainings_for_every_amount_of_feedback(done):
    _, found, work = done
    for stage in ("plain/", "lol/"):
        for k in range(4):
            assert 0 <= found["metrics"][f"{stage}mrr_at_10_with_{k}"] <= 1
            assert found["metrics"][f"{stage}loss_at_{k}"] > 0
    # no feedback, nothing to learn from: both trainings leave the query as it is
    assert found["metrics"]["plain/loss_at_0"] == pytest.approx(found["metrics"]["lol/loss_at_0"], rel=1e-6)
    assert found["metrics"]["plain/loss_at_3"] != found["metrics"]["lol/loss_at_3"]
    assert found["summary"].startswith("test queries, from no feedback to all of it: random amounts of feedback MRR@10")
    assert "; LoL MRR@10 " in found["summary"] and "more is worse" in found["summary"]
    lines = (work / "feedback.txt").read_text().splitlines()
    assert len(lines) == 9 and lines[1].startswith("random amounts of feedback, k = 0") and "nan" in lines[1]
    assert (work / "feedback.png").stat().st_size > 5000


def test_the_model_does_what_the_run_said(done):
    made, found, work = done
    model = load_model(work / "model")
    material = made._texts()
    reviser = lol.vector_reviser(model.definition)
    figures = measurement(reviser, material.test, material.passages, material.index, material.grades)
    for k, v in figures(model.variables["params"]).items():
        assert found["metrics"][f"lol/{k}"] == pytest.approx(v, abs=1e-5)
    np.testing.assert_array_equal(model.variables["constants"]["words"], material.constants["words"])
    assert (work / "model" / "tokenizer" / "tokenizer.json").is_file()
    # both trainings begin with the same parameters
    start = made.build().init(jax.random.key(0))["params"]
    assert jax.tree.structure(start) == jax.tree.structure(model.variables["params"])


def test_files_of_a_users_own_and_a_backbone(folder, tmp_path):
    collection = text_collection(Data(path=str(folder)), 0)
    tokenizer = Tokenizer.train(collection.documents, 300)
    body = BERT(BERTConfig(tokenizer.vocab_size, 16, 1, 2, 32, 32, 2, pooler=True))
    variables = body.init(jax.random.key(5), jnp.ones((1, 4), jnp.int32))

    def beside(place):
        (place / "tokenizer").mkdir()
        tokenizer.write(place / "tokenizer" / "tokenizer.json")

    save_model(tmp_path / "bert", body, variables, {}, {}, beside)
    own = {"data": Data(path=str(folder)), "reviser": "text", "backbone": str(tmp_path / "bert"), "compare": False,
           "run": str(folder / "run.tsv"), "vectors": str(folder / "m.npy"),
           "vector_ids": str(folder / "ids.txt")}  # fmt: skip
    made = recipe.Recipe(**own, **TINY)
    material = made._texts()
    np.testing.assert_allclose(material.index, np.load(folder / "m.npy").astype(np.float32))
    judged = collection.judgements.padded(collection.splits["train"])[0][:, 0]
    np.testing.assert_array_equal(material.train["feedback"], (judged[:, None] + [7, 14, 21]) % 60)
    # a passage's own tokens, without [CLS] and [SEP]
    assert not np.isin(material.passages, [tokenizer.cls, tokenizer.sep]).any()
    np.testing.assert_array_equal(material.passages[4], tokenizer.ids(collection.documents[4])[:8])
    found = train("lol", made, tmp_path / "run", Settings(Parallel(devices=1)), progress=False)
    assert "plain/loss_at_0" not in found["metrics"] and np.isfinite(found["metrics"]["lol/loss_at_3"])
    params = unbox(made.build().init(jax.random.key(0))["params"])
    for part in ("embeddings", "layer0"):
        known = load_model(tmp_path / "bert").variables["params"][part]
        jax.tree.map(np.testing.assert_array_equal, params["body"][part], known)
    assert params["projection"]["kernel"].shape == (16, 6)
    for change, says in (
        ({"reviser": "mlm", "vectors": "", "vector_ids": ""}, "has no masked-language head"),
        ({"reviser": "tokens"}, r"have 6 entries, the tokenizer has \d+ words: --reviser tokens needs one for each"),
        ({"max_length": 40}, "the backbone reads 32 tokens: lower --max-length"),
    ):
        with pytest.raises(UserError, match=says):
            recipe.Recipe(**{**TINY, **own, **change}).build()


@pytest.mark.parametrize("reviser", ["mlm", "tokens"])
def test_sparse_revisers_see_bm25_weights(reviser, folder):
    made = recipe.Recipe(data=Data(path=str(folder)), reviser=reviser, first_pass="index", **{**TINY, "width": 32})
    material = made._texts()
    assert material.index.shape == (60, material.tokenizer.vocab_size) and not material.index[:, :5].any()
    scores = recipe.bag_of_words(material.train["query"], material.index.shape[1]) @ material.index.T
    best = np.take_along_axis(scores, material.train["feedback"], 1)
    np.testing.assert_allclose(best[:, 0], scores.max(1), rtol=1e-5)
    assert (np.diff(best, axis=1) <= 1e-5).all()
    inputs = [x[:1] for x in recipe.first_inputs(material)]
    params = jax.jit(material.reviser.init)(jax.random.key(0), *inputs)
    vectors, _ = jax.jit(material.reviser.revise)(params, *inputs, jnp.array([[2, 0]]), None)
    assert vectors.shape == (1, 2, material.index.shape[1]) and not np.asarray(vectors)[..., :5].any()


def test_arms():
    found = recipe.arm("mean of query and feedback", 0)
    assert found["loss_at_5"] > found["loss_at_0"]
    with pytest.raises(UserError, match="unknown arm 'best' of lol's claim"):
        recipe.arm("best", 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"revisions": 3, "k_max": 1}, r"--revisions 3 with --k-max 1: cannot draw 3 distinct sizes from 0\.\.1"),
        ({"k_max": 0}, "--k-max must be at least 1, got 0"),
        ({"k_max": 801}, "--k-max 801: sizes must be at least 1 and k_max in"),
        ({"revisions": 0}, "--revisions must be at least 1, got 0"),
        ({"weight": -1.0}, "--weight must not be negative, got -1.0"),
        ({"weight": float("nan")}, "--weight must not be negative, got nan"),
        ({"query_weight": -0.1}, "--query-weight must not be negative"),
        ({"scale": 0.0}, "--scale must be above 0, got 0.0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"reviser": "text"}, "--reviser text reads texts; --data.name clusters has vectors only"),
        ({"run": "r.tsv"}, "--run r.tsv needs texts; --data.name clusters has none"),
        ({"vectors": "m.npy"}, "--vectors and --vector-ids belong together"),
        ({"vectors": "m", "vector_ids": "i"}, "--vectors has no vectors of queries, which --reviser vectors reads"),
        ({"backbone": "b"}, "--backbone b needs --reviser text, mlm or tokens"),
        (
            {"vectors": "m", "vector_ids": "i", "reviser": "text", "first_pass": "index"},
            "--first-pass index cannot search",
        ),
        (
            {"query_length": 99, "max_length": 98, "reviser": "text"},
            "--query-length 99 must be at most --max-length 98",
        ),
        ({"data": Data("marco")}, "--data.name 'marco' is unknown"),
        ({"data": Data("synonyms"), "width": 700}, "--width 700: features must be in"),
        ({"data": Data("synonyms"), "k_max": 601}, "--k-max 601 must be at most 600, the number of documents"),
        ({"data": Data("synonyms"), "reviser": "text", "width": 40}, "--width 40 must be a multiple of 32"),
        ({"data": Data("synonyms"), "reviser": "text", "backbone": "nowhere"}, "--backbone nowhere: "),
    ],
)
def test_impossible_settings_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        recipe.Recipe(**change).build()


def test_wrong_files_are_named(folder, tmp_path):
    base = {"data": Data(path=str(folder)), **TINY}
    (tmp_path / "run.tsv").write_text("someone d1 1")
    with pytest.raises(UserError, match="has no document for any judged query; are its ids the collection's"):
        recipe.Recipe(**base, run=str(tmp_path / "run.tsv")).build()
    own = text_collection(base["data"], 0).query_ids[0]
    (tmp_path / "run.tsv").write_text(f"{own} d1 1\n{own} d1 2")
    with pytest.raises(DataError, match="has document 'd1' twice"):
        recipe.Recipe(**base, run=str(tmp_path / "run.tsv")).build()
    (tmp_path / "ids.txt").write_text("d0\nd1")
    with pytest.raises(DataError, match="has 60 rows, but .* names 2 documents"):
        recipe.Recipe(
            **base, reviser="text", vectors=str(folder / "m.npy"), vector_ids=str(tmp_path / "ids.txt")
        ).build()


@pytest.mark.claim
def test_the_claim():
    import zoo
    from trainers.claims import run_claim

    found = run_claim(zoo.card("lol"), 3)
    assert found["paired"]["mean"] > 0, json.dumps(found["paired"])
