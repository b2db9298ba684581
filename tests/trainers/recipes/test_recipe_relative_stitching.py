"""Graph networks and text encoders trained apart and stitched by relative_representations' recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.model import load_model
from data.graphs import planted_communities
from data.parallel_texts import translated_documents
from data.text import Tokenizer
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, Optimizer, UserError
from trainers.recipes.representation import relative_representations as recipe
from trainers.run import train, train_in_memory
from zoo.base import Context
from zoo.nn.bag_of_words import BagOfWords
from zoo.nn.gcnii import GCNII
from zoo.nn.stitching_heads import RelativeHead, StitchingHead


def run(into, **change):
    settings = Settings(Parallel(devices=1))
    return train("relative_representations", recipe.Recipe(**change), into, settings, progress=False)


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)


def write_graph(folder, graph):
    np.savez(folder / "nodes.npz", features=graph.x, labels=graph.label, train=graph.train)
    (folder / "edges.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in zip(graph.src, graph.dst, strict=True)))
    return str(folder)


def write_texts(file, texts):
    rows = zip(*texts.texts.values(), texts.labels, texts.train, strict=True)
    header = ",".join(f"text_{name}" for name in texts.texts)
    lines = [",".join([*map(str, row[:-1]), "train" if row[-1] else "test"]) for row in rows]
    file.write_text("\n".join([f"{header},label,split", *lines]) + "\n")
    return str(file)


def test_graph_networks_are_trained_end_to_end_and_stitched(tmp_path):
    graph = planted_communities(0, nodes=160)
    found = run(tmp_path / "run", data=Data(path=write_graph(tmp_path, graph)), widths=(32, 32), layers=1, anchors=40,
                encoder_steps=400, batch_size=32)  # fmt: skip
    m = found["metrics"]
    assert m["stitching/relative_own"] > 0.85 and m["stitching/relative_stitched"] > m["stitching/relative_own"] - 0.1
    assert m["stitching/absolute_own"] > 0.85
    assert m["stitching/absolute_stitched"] < m["stitching/relative_stitched"] - 0.25
    assert m["stitching/anchors"] == 40 and "heads/loss" not in m
    first, *table = found["summary"].splitlines()
    assert first.startswith("test accuracy: relative own") and table[0].split()[:3] == ["network", "0", "(32)"]
    assert (tmp_path / "run" / "stitching.txt").read_text().splitlines() == table
    assert (tmp_path / "run" / "stitching.png").stat().st_size > 1000
    # the exported parts give the table again; anchors are training nodes
    model = load_model(tmp_path / "run" / "model")
    kept, held = model.variables["constants"], np.flatnonzero(~graph.train)
    ids = np.asarray(kept["anchor_ids"])
    assert model.definition == RelativeHead(4) and graph.train[ids].all() and len(set(ids.tolist())) == 40
    parts = {k: jnp.asarray(v) for k, v in graph.arrays().items()}
    encode = jax.jit(GCNII(32, 1).apply)
    for i in range(2):
        z = encode({"params": kept[f"encoder{i}"]}, **parts)
        np.testing.assert_allclose(kept["anchors"][f"m{i}"], z[ids], rtol=1e-4, atol=1e-5)
        r = unit(unit(z)[held] @ unit(z[ids]).T)
        far = np.asarray(encode({"params": kept[f"absolute_encoder{i}"]}, **parts))[held]
        for j in range(2):
            for kind, x in (("relative", r), ("absolute", far)):
                head = kept["heads"][f"{kind}{j}"]["out"]
                hit = np.mean(np.argmax(x @ head["kernel"] + head["bias"], 1) == graph.label[held])
                assert hit == pytest.approx(m[f"stitching/{kind}_{i}_{j}"], abs=1e-6)
    np.testing.assert_array_equal(model.variables["params"]["out"]["bias"], kept["heads"]["relative0"]["out"]["bias"])


def test_networks_read_unit_rows_or_latents_and_see_nodes_in_one_order():
    made = recipe.Recipe(data=Data("communities"), widths=(4, 6), layers=1, anchors=9, encoder_steps=7).build()
    updates, variables = made.phases[0].updates, jax.jit(made.init)(jax.random.key(0))
    assert list(updates) == ["relative0", "absolute0", "relative1", "absolute1"] and made.phases[0].steps == 7
    orders = [u.stream.batch(0)["node"] for u in updates.values()]
    assert np.array_equal(orders[0], orders[1]) and np.array_equal(orders[2], orders[3])
    assert not np.array_equal(orders[0], orders[2])
    batch = {k: jnp.asarray(v) for k, v in updates["relative0"].stream.batch(0).items()}
    seen = {n: u.objective.forward(variables, batch, Context(jax.random.key(1), train=False))[0]["embedding"]
            for n, u in list(updates.items())[:2]}  # fmt: skip
    np.testing.assert_allclose(np.linalg.norm(seen["relative0"], axis=1), 1, rtol=1e-5)
    assert seen["relative0"].shape == (64, 9) and seen["absolute0"].shape == (64, 4)
    assert [u.trainable for u in updates.values()] == [(f"{n}/.*",) for n in updates]
    assert set(variables["constants"]) == {"graph", "anchor_ids", "hash"}


def test_encoders_of_two_languages_are_stitched_by_translated_anchors(tmp_path):
    texts = translated_documents(0, documents=240, topics=3, concepts=18, synonyms=2, focus=0.7)
    path = write_texts(tmp_path / "mine.csv", texts)
    made = recipe.Recipe(data=Data(path=path), widths=(12, 12), hidden=16, anchors=30, encoder_steps=120,
                         head_steps=120, batch_size=32, text_length=24,
                         optimizer=Optimizer(learning_rate=0.01)).build()  # fmt: skip
    found = train_in_memory(made, 10, 0)
    m = found.metrics
    assert m["stitching/relative_own"] > 0.85 and m["stitching/relative_stitched"] > m["stitching/relative_own"] - 0.1
    assert m["stitching/absolute_own"] > 0.85
    assert m["stitching/absolute_stitched"] < m["stitching/relative_stitched"] - 0.25
    assert made.summary(m).splitlines()[1].split() == ["north", "0", "(12)", "south", "1", "(12)"]
    # the exported tokenizers, encoders and heads give the table again
    model = made.export(found.chosen, found.artefacts)
    model.beside(tmp_path)
    kept, held = model.variables["constants"], np.flatnonzero(~texts.train)
    assert model.definition == StitchingHead(3, activation="silu")
    ids = np.flatnonzero(texts.train)[np.asarray(kept["anchor_ids"])]
    for i, name in enumerate(("north", "south")):
        tokenizer = Tokenizer.read(tmp_path / "tokenizer" / name / "tokenizer.json")
        encoder = BagOfWords(tokenizer.vocab_size, 12, 16, tokenizer.pad)
        params = {"params": kept[f"encoder{i}"]["encoder"]}
        z = np.asarray(encoder.apply(params, jnp.asarray(tokenizer.encode(texts.texts[name], 24))))
        # the same documents in each language are the anchors
        np.testing.assert_allclose(kept["anchors"][f"m{i}"], z[ids], rtol=1e-4, atol=1e-5)
        r = jnp.asarray(unit(z)[held] @ unit(z[ids]).T)
        for j in range(2):
            out = model.definition.apply({"params": kept["heads"][f"relative{j}"]}, r)
            hit = np.mean(np.argmax(out, 1) == texts.labels[held])
            assert hit == pytest.approx(m[f"stitching/relative_{i}_{j}"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["communities", "translations"])
@pytest.mark.parametrize("seed", [0, 1])
def test_generated_sets_at_the_default_size(name, seed):
    m = train_in_memory(recipe.Recipe(seed=seed, data=Data(name)).build(), 10, seed).metrics
    assert m["stitching/relative_own"] > 0.85 and m["stitching/relative_stitched"] > 0.8
    assert m["stitching/absolute_own"] > 0.85
    assert m["stitching/absolute_stitched"] < m["stitching/relative_stitched"] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"anchor_method": "kmeans"}, {"anchor_method": "stratified", "subspaces": 2},
                                    {"bin_size": 0.1, "similarity": "inner", "dtype": "bfloat16"}])  # fmt: skip
@pytest.mark.parametrize("name", ["communities", "translations"])
def test_options_of_the_projection_hold_for_every_kind(name, change):
    made = recipe.Recipe(data=Data(name), widths=(8, 8), layers=1, anchors=20, encoder_steps=3, head_steps=3, **change)
    m = train_in_memory(made.build(), 0, 0).metrics
    assert np.isfinite(m["stitching/relative_stitched"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Data("communities"), "anchors": 281}, "--anchors 281 are more than the 280 training nodes"),
        ({"data": Data("translations"), "anchors": 631}, "--anchors 631 are more than the 630 training items"),
        ({"data": Data("communities"), "layers": 0}, "--layers must be at least 1, got 0"),
        ({"data": Data("communities"), "dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"data": Data("communities"), "widths": (8,)}, "--widths needs two encoders or more"),
        ({"data": Data("communities"), "subspaces": 7}, "--subspaces 7 must divide every model's width; one has 64"),
        ({"data": Data("translations"), "text_length": 2}, "--text-length must be at least 3"),
        ({"data": Data("translations"), "vocab_size": 5}, "--vocab-size must be above the 5 special tokens, got 5"),
    ],
)
def test_impossible_settings_of_graphs_and_texts_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        recipe.Recipe(**change).build()
