"""gear's recipe: its evaluation and measures, its picture, a run on files, and the settings it refuses."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.model import load_model
from data.stream import DataError
from data.triplets import key_value_documents
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.retrieval import gear as recipe
from trainers.run import train
from zoo.base import Context
from zoo.retrieval import gear

TINY = recipe.Recipe(width=8, depth=1, heads=2, batch_size=8, steps=2, eval_every=2)
DATA = key_value_documents(0, train_documents=12, test_documents=5, queries=2, topics=6)


@pytest.fixture(scope="module")
def tiny():
    model = TINY.module(DATA)
    batch = {k: jnp.asarray(v[:2]) for k, v in DATA["test"].items()}
    columns = ("query", "query_mask", "document", "document_mask", "target")
    return model, jax.jit(model.init)(jax.random.key(0), *(batch[c] for c in columns))


def test_the_model_fits_the_data(tiny):
    model, _ = tiny
    assert model.shape.vocab_size == DATA.info["vocab_size"] and model.shape.max_positions == 38
    assert model.decode_id == DATA.info["vocab_size"] and model.shape.token_types == 0
    chosen = dataclasses.replace(
        TINY, depth=3, attention_block=1, tau=0.1, dtype="bfloat16", dropout=0.2, new_tokens=50
    )
    model = chosen.module(DATA)
    assert (model.shown_block, model.initial_tau, model.shape.dropout, model.shape.max_positions) == (1, 0.1, 0.2, 50)
    assert model.dtype == jnp.bfloat16


def test_evaluation_sees_every_row_once_and_leaves_out_the_ends(tiny):
    model, variables = tiny
    evaluation = recipe.three_tasks(model, DATA, 4)
    update, seen = jax.jit(evaluation.update), evaluation.init()
    for i in range(evaluation.stream.steps_per_epoch):
        seen, changed = update(seen, variables, evaluation.stream.batch(i), Context(jax.random.key(i), train=False))
    assert changed == {} and evaluation.stream.steps_per_epoch == 3
    test = DATA["test"]
    weights = {"params": variables["params"]}
    document = (jnp.asarray(test["document"]), jnp.asarray(test["document_mask"]))
    query = (jnp.asarray(test["query"]), jnp.asarray(test["query_mask"]))
    encoded = model.apply(weights, *document, method="encode_document")
    np.testing.assert_allclose(
        seen["query"], model.apply(weights, *query, method="encode_query")["embedding"], atol=1e-5
    )
    np.testing.assert_allclose(seen["document"][test["document_id"]], encoded["embedding"], atol=1e-5)
    fused, shown = model.apply(weights, *query, encoded["tokens"], document[1], show=True, method="fuse")
    by_token = np.asarray(shown).mean(1)[:, 1:4].mean(1)
    expected = [
        [row[owner == s].mean() for s in range(6)] for row, owner in zip(by_token, test["sentence_ids"], strict=True)
    ]
    np.testing.assert_allclose(seen["local"], expected, rtol=1e-4)
    np.testing.assert_allclose(
        recipe.token_attention(model, variables, jax.tree.map(jnp.asarray, test)), by_token, rtol=1e-4
    )
    made = gear.generate(model, variables, fused, query[1], 3, 2)
    np.testing.assert_array_equal(seen["made"], made)
    found = evaluation.compute(jax.tree.map(np.asarray, seen))
    assert found == recipe.measures(jax.tree.map(np.asarray, seen), test, 2)


def test_measures_by_hand():
    test = {
        "document_id": np.array([0, 2, 1]), "sentence": np.array([1, -1, 0]),
        "target": np.array([[5, 6, 2], [7, 2, 0], [8, 2, 0]]),
        "target_mask": np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0]], bool),
    }  # fmt: skip
    seen = {
        "query": np.array([[1.0, 0], [1, 0], [0, 1]]), "document": np.array([[0.9, 0.1], [0.2, 0.8], [0.8, 0.2]]),
        "local": np.array([[0.1, 0.3, 0.2], [0.0, 0.0, 0.0], [0.1, 0.4, -np.inf]]),
        "made": np.array([[5, 6, 2, 2], [9, 7, 2, 2], [8, 2, 5, 5]]),
    }  # fmt: skip
    found = recipe.measures(seen, test, 2)
    assert found["global_recall_1"] == pytest.approx(2 / 3) and found["global_recall_5"] == 1
    assert found["global_map_5"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["local_recall_1"] == 0.5 and found["local_recall_3"] == 1
    assert found["local_chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found["exact_match"] == pytest.approx(2 / 3) and found["f1"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert recipe.local_measures(np.zeros((2, 3)), np.array([-1, -1]))["local_recall_1"] == 0
    # ties go to the earlier sentence
    assert recipe.local_measures(np.zeros((2, 3)), np.array([0, 1]))["local_recall_1"] == 0.5


def test_the_picture_shows_a_sentence_a_line(tmp_path, tiny):
    model, variables = tiny
    recipe.draw_attention(types.SimpleNamespace(chosen=variables), tmp_path, TINY, model, DATA)
    assert (tmp_path / "attention.png").stat().st_size > 10000
    lines, texts = recipe.sentence_lines(
        np.arange(6.0), np.array([1, 4, 5, 6, 4, 2]), np.array([-1, 0, 0, 1, 1, 1]), list("abcdefghij")
    )
    np.testing.assert_array_equal(lines, [[1, 2, np.nan], [3, 4, 5]])
    assert texts == [["e", "f", ""], ["g", "e", "c"]]


def test_random_sentences_are_found_by_chance():
    found = recipe.arm("random sentence", 0)
    assert abs(found["local_recall_1"] - 1 / 6) < 0.06 and found["local_chance"] == pytest.approx(1 / 6)
    with pytest.raises(UserError, match="arm 'alpha 1'"):
        recipe.arm("alpha 1", 0)


@pytest.mark.slow
def test_a_run_on_files_leaves_a_model_that_answers(tmp_path):
    kinds = {"sings": "cat", "sleeps": "dog", "runs": "horse"}
    for name, count in (("train", 24), ("test", 6)):
        rows = []
        for i in range(count):
            verb = list(kinds)[i % 3]
            text = f"In town {i} it rains. The {kinds[verb]} {verb}. Night falls."
            rows.append({"query": f"who {verb} in town {i}", "document": text, "target": kinds[verb], "doc_id": str(i)})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    settings = dataclasses.replace(TINY, data=Data(path=str(tmp_path)), steps=4, queue_size=16, vocab_size=60, beams=2)
    found = train("gear", settings, tmp_path / "run", Settings(Parallel(devices=1)), progress=False)
    assert found["metrics"]["test/local_chance"] == pytest.approx(1 / 3)
    assert "document found first" in found["summary"] and (tmp_path / "run" / "attention.png").exists()
    model = load_model(tmp_path / "run" / "model")
    assert model.definition.decode_id == model.definition.shape.vocab_size
    ids = jnp.array([[2, 5, 6, 3]], jnp.int32)
    states = model.definition.apply(model.variables, ids, ids > 0, method="encode_document")["tokens"]
    scores, _ = gear.localize(
        model.definition, model.variables, ids, ids > 0, states, ids > 0, jnp.array([[-1, 0, 1, -1]]), 2
    )
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"beams": 0}, "--beams must be at least 1"),
        ({"heads": 3}, "--heads 3 must divide --width 8"),
        ({"attention_block": 1}, r"--attention-block must lie in \[0, 0\] \(or be -1\), got 1"),
        ({"attention_block": -2}, "got -2"),
        ({"tau": 0.0}, "--tau must be positive, got 0.0"),
        ({"alpha": -1.0}, "--alpha must not be negative"),
        ({"soft": 2.0}, r"--soft must lie in \[0, 1\]"),
        ({"momentum": 1.5}, r"--momentum must lie in \[0, 1\]"),
        ({"dropout": 1.0}, r"--dropout 1 and --label-smoothing 0 must lie in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"--label-smoothing -0.1 must lie in \[0, 1\)"),
        ({"queue_size": 12}, "--queue-size 12 must be a multiple of --batch-size 8"),
        ({"queue_size": -8}, "--queue-size -8 must be a multiple"),
        ({"data": Data("paq")}, "--data.name 'paq' is unknown; use keyvalue, or --data.path FOLDER"),
        ({"data": Data(path="x"), "document_length": 2}, "--document-length must be at least 3, got 2"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change).load()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="train.jsonl: there is no such file"):
        dataclasses.replace(TINY, data=Data(path=str(tmp_path))).load()


@pytest.mark.claim
def test_the_claim():
    import zoo
    from trainers.claims import run_claim

    found = run_claim(zoo.card("gear"), 5)
    assert found["verdict"] == "confirmed", json.dumps(found["paired"])
