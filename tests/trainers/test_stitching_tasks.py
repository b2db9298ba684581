"""What is stitched: which reader takes which data, what each model reads, by what anchors are chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.graphs import Graph, planted_communities
from data.latents import Latents, rotated_latents
from data.lsa import latent_semantic_words
from data.parallel_texts import ParallelTexts, translated_documents
from data.stream import DataError
from data.text import Tokenizer
from trainers.errors import UserError
from trainers.stitching import checked_anchors, likeness, under
from trainers.stitching_tasks import node_task, stitching_data, text_task
from zoo.base import Objective
from zoo.representation.relative_representations import relative_projection


def test_data_are_told_apart_by_their_files(tmp_path):
    graph = planted_communities(0, nodes=20)
    np.savez(tmp_path / "nodes.npz", features=graph.x, labels=graph.label)
    with pytest.raises(DataError, match=r"expected edges.csv \(or .tsv, .txt\) and nodes.npz"):
        stitching_data("digits", str(tmp_path), 0)
    (tmp_path / "edges.csv").write_text("0,1\n")
    assert isinstance(stitching_data("digits", str(tmp_path), 0), Graph)
    (tmp_path / "nodes.npz").unlink()
    with pytest.raises(DataError, match="expected edges.csv"):
        stitching_data("digits", str(tmp_path), 0)
    (tmp_path / "mine.csv").write_text("text,label,split\na,x,train\nb,y,train\nc,y,test\n")
    assert isinstance(stitching_data("digits", str(tmp_path / "mine.csv"), 0), ParallelTexts)
    np.savez(tmp_path / "mine.npz", **rotated_latents(0, samples=40)[0].models, labels=np.arange(40) % 2)
    assert isinstance(stitching_data("digits", str(tmp_path / "mine.npz"), 0), Latents)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("rotated", Latents), ("translations", ParallelTexts), ("communities", Graph)],
)
def test_generated_sets_depend_on_the_seed(name, kind):
    a, b, again = (stitching_data(name, None, seed) for seed in (0, 1, 0))
    assert isinstance(a, kind) and a.fingerprint == again.fingerprint != b.fingerprint


def test_an_unknown_name_is_told_the_generated_ones():
    with pytest.raises(DataError, match=r"unknown TFDS set 'comunities'.*rotated, words, translations, communities"):
        stitching_data("comunities", None, 0)


def test_languages_take_turns_and_have_tokenizers_of_their_own(tmp_path):
    data = translated_documents(0, documents=40, topics=2, concepts=4, synonyms=2, length=5)
    task = text_task(data, (6, 7, 8), 4, 9, 200, jnp.float32)
    assert task.inputs == ("ids0", "ids1", "ids0") and task.names == ("north 0 (6)", "south 1 (7)", "north 2 (8)")
    assert [m.body.features for m in task.modules] == [6, 7, 8] and task.activation == "silu" and not task.images
    assert task.train["ids0"].shape == (28, 9) and task.test["ids1"].shape == (12, 9) and task.items == 28
    # ids are each language's own, row by row the same documents
    task.write_tokenizers(tmp_path)
    held = np.flatnonzero(~data.train)
    for number, name in enumerate(("north", "south")):
        tokenizer = Tokenizer.read(tmp_path / "tokenizer" / name / "tokenizer.json")
        own = [data.texts[name][i] for i in held]
        np.testing.assert_array_equal(task.test[f"ids{number}"], tokenizer.encode(own, 9))
        assert task.modules[number].body.vocab_size == tokenizer.vocab_size
        assert "[UNK]" not in tokenizer.core.encode(own[0]).tokens
    first = Tokenizer.read(tmp_path / "tokenizer" / "tokenizer.json")
    np.testing.assert_array_equal(first.encode([data.texts["north"][held[0]]], 9)[0], task.test["ids0"][0])
    # latent semantics of the first language: the weighted sum of a document's words
    vectors, weights = latent_semantic_words(task.train["ids0"], first.vocab_size, 28)
    for row, ids in zip(task.looked_at(), task.train["ids0"], strict=True):
        np.testing.assert_allclose(row, sum(weights[i] * vectors[i] for i in ids), rtol=1e-4, atol=1e-5)
    one = text_task(data, (6,), 4, 9, 200, jnp.float32)
    assert set(one.train) == {"ids0", "label"} and list(one.tokenizers) == ["north"]


def test_held_out_texts_teach_the_tokenizer_nothing():
    texts = {"text": ("ab ba", "ba ab", "ab \u0436", "aa bb")}
    data = ParallelTexts(texts, np.array([0, 1, 0, 1], np.int32), ("x", "y"), np.array([True, True, False, True]))
    task = text_task(data, (4, 4), 4, 6, 50, jnp.float32)
    tokens = task.tokenizers["text"].core.encode("ab \u0436", add_special_tokens=False).tokens
    assert tokens[-1] == "[UNK]" and tokens[0] != "[UNK]"
    assert task.inputs == ("ids0", "ids0")


def test_nodes_are_numbered_through_and_features_decide_where_anchors_lie():
    graph = planted_communities(0, nodes=20)
    task = node_task(graph, (4, 5))
    np.testing.assert_array_equal(task.train["node"], np.flatnonzero(graph.train))
    np.testing.assert_array_equal(task.test["label"], graph.label[~graph.train])
    np.testing.assert_array_equal(task.looked_at(), graph.x[graph.train])
    assert task.num_classes == 4 and task.names == ("network 0 (4)", "network 1 (5)") and not task.modules


def test_shared_collections_are_everyones():
    def forward(variables, batch, context):
        return variables["params"] + variables["constants"], {"state": variables["state"] + 1}

    objective = Objective(lambda rng, batch: {}, forward, lambda *a: None, gathers=(), name="toy")
    variables = {"params": {"a": 1, "b": 2}, "constants": 10, "state": {"a": 5, "b": 7}}
    out, mutated = under("b", objective, shared=("constants",)).forward(variables, {}, None)
    assert out == 12 and mutated == {"state": {"a": 5, "b": 8}}
    variables = {**variables, "constants": {"a": 10, "b": 20}}
    assert under("b", objective).forward(variables, {}, None)[0] == 22


def test_spaces_are_compared_in_the_networks_trained_for_it():
    x = jax.random.normal(jax.random.key(0), (9, 3))
    turn = jnp.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    own = {"m0": x[:4], "m1": x[:4] @ turn}
    found = likeness({"a": x, "b": x @ turn}, own, relative_projection, {"a": x, "b": -x})
    assert found["relative_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["absolute_cosine"] == pytest.approx(-1, abs=1e-5) and found["absolute_cka"] == pytest.approx(1)
    with pytest.raises(UserError, match=r"model one: the latent of anchor 1 \(id 8\) has zero length"):
        checked_anchors("one", np.array([3, 8]), jnp.array([[1.0, 0], [0, 0]]))
