"""omnimatch's recipe: runs on generated and on read tables, what it writes and exports, its arms, what it refuses."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import refused

from checkpoints.model import load_model
from data.builders.tables import Fabrication, fabricate_repository, joinable_repository, source_tables
from data.stream import DataError
from data.table_profiles import NUM_FEATURES, RELATIONS
from data.tables import column_names, column_tables, cross_table_pairs, labels_of, read_tables, write_table
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.retrieval import omnimatch as recipe
from trainers.run import train
from zoo.base import Context, reduce_mean
from zoo.nn.graph import RGCNEncoder
from zoo.retrieval import omnimatch

SMALL = {"epochs": 3, "hidden": 8, "features": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four small tables on disk and their labelled joins."""
    root = tmp_path_factory.mktemp("tables")
    made = fabricate_repository(source_tables(0, 2, 24, 40), Fabrication((2, 3), (0.5,)), 1, 0)
    for table in made.tables:
        write_table(root / f"{table.name}.csv", table)
    names = column_names(made.tables)
    rows = [[f"{names[u][0]}.csv", names[u][1], f"{names[v][0]}.csv", names[v][1]] for u, v in made.joins]
    labels = tmp_path_factory.mktemp("labels") / "joins.csv"
    with labels.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return root, labels


def run(into, **change):
    settings = Settings(Parallel(devices=1))
    return train("omnimatch", recipe.Recipe(**{**SMALL, **change}), into, settings, progress=False)["metrics"]


def test_a_run_on_files_lists_joins_and_leaves_a_model(folder, tmp_path):
    data = Data(path=str(folder[0]))
    metrics = run(tmp_path, data=data, labels=str(folder[1]))
    tables = read_tables(folder[0])
    pairs = cross_table_pairs(column_tables(tables))
    assert metrics["graphs/candidate_pairs"] == len(pairs) and metrics["graphs/columns"] == len(column_names(tables))
    assert 0 < metrics["discover/average_precision"] <= 1 and metrics["discover/missed_by_blocking"] == 0
    assert metrics["discover/joins"] == len(folder[1].read_text().split()) and "held_out/loss" in metrics
    rows = list(csv.reader((tmp_path / "joins.csv").open()))
    assert rows[0] == ["file", "column", "other_file", "other_column", "score"] and len(rows) == 1 + len(pairs)
    scores = [float(r[-1]) for r in rows[1:]]
    assert scores == sorted(scores, reverse=True) and (tmp_path / "joins.png").stat().st_size > 1000
    # the exported encoder gives the listed scores
    model = load_model(tmp_path / "model")
    assert model.definition == RGCNEncoder(5, (8,), 8)
    graph, _, _ = recipe.column_graph(tables)
    h = omnimatch.encode(model.definition, model.variables["params"], graph)
    found = np.sort(np.asarray(omnimatch.join_scores(h, jnp.asarray(pairs))))[::-1]
    np.testing.assert_allclose(found, scores, atol=1e-4)
    again = recipe.Recipe(**SMALL, data=data, labels=str(folder[1]))
    assert train("omnimatch", again, tmp_path, Settings(Parallel(devices=1)), progress=False)["already"]


@pytest.mark.slow
def test_other_objectives_and_settings_run(folder, tmp_path):
    data = Data(path=str(folder[0]))
    for number, change in enumerate([
        {"objective": "rgcn_cross_entropy", "num_bases": 2},
        {"objective": "mlp_cross_entropy"},
        {"threshold": 0.6, "min_sim": 0.0, "edges": False, "relation_init": "per_relation"},
        {"blocking": True, "similarity": "minhash", "dtype": "bfloat16", "batch_size": 8},
    ]):  # fmt: skip
        metrics = run(tmp_path / str(number), data=data, **change)
        assert np.isfinite(metrics["discover/best_score"]) and "discover/average_precision" not in metrics
    metrics = run(tmp_path / "bundled", data=Data("bundled"))
    assert 0 < metrics["discover/mrr"] <= 1


def test_the_objective_learns_from_the_cut_tables_and_watches_a_tenth():
    built = recipe.Recipe(**SMALL).build()
    training = fabricate_repository(joinable_repository(0).tables, Fabrication(), 1, 0)
    triplets = omnimatch.build_triplets(training.joins, training.non_joins)
    phase = built.phases[1]
    held, learnt = (s.arrays["triplet"] for s in (phase.evaluate[0].stream, phase.updates["main"].stream))
    assert len(held) == len(triplets) // 10
    both = np.concatenate([held, learnt])
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, triplets.tolist()))
    assert phase.updates["main"].stream.steps_per_epoch == 1 and phase.steps == 3
    assert phase.updates["main"].stream.batch_size == omnimatch.bucket(len(learnt))
    assert recipe.Recipe(seed=1).build().data_fingerprint != built.data_fingerprint


def test_pairs_are_learnt_in_both_orders_with_weighted_positives():
    training = fabricate_repository(joinable_repository(0).tables, Fabrication(), 1, 0)
    chosen = recipe.Recipe(objective="mlp_cross_entropy")
    examples = chosen._examples(training)
    joins = {tuple(p) for p in training.joins.tolist()}
    for (u, v), label in zip(examples["pair"].tolist(), examples["label"].tolist(), strict=True):
        assert label == ((u, v) in joins or (v, u) in joins)
    assert len(examples["pair"]) == 2 * (len(joins) + len(training.non_joins))
    assert {(v, u) for u, v in examples["pair"].tolist()} == {tuple(p) for p in examples["pair"].tolist()}
    encoder, scorer, objective = chosen._model(training)
    assert encoder is None
    context = Context(rng=jax.random.key(0))
    loss = objective.loss({"logits": jnp.zeros(2)}, {"label": jnp.array([1, 0]), "mask": jnp.ones(2, bool)}, context)
    weight = len(training.non_joins) // len(joins)
    assert weight > 1
    np.testing.assert_allclose(loss.elements.values, [weight * np.log(2), np.log(2)], rtol=1e-5)


def test_measures():
    similarities = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.3]], np.float32)
    assert recipe.max_similarity(similarities).tolist() == pytest.approx([0.9, 0.8, 0.3])
    five = np.tile(similarities[:, :1], (1, 5))
    found = recipe.single_similarities(five, np.array([False, True, False]))
    assert found == dict.fromkeys(RELATIONS, 1.0)
    rng = np.random.default_rng(0)
    x = rng.random((60, 5))
    forest = recipe.random_forest(x, x[:, 0] > 0.5, np.array([[0.9, 0.5, 0.5, 0.5, 0.5], [0.1, 0.5, 0.5, 0.5, 0.5]]))
    assert forest[0] > 0.8 and forest[1] < 0.2


def test_arms_are_paired_and_named():
    trivial = recipe.arm("random scores", 0)
    repository = joinable_repository(0)
    share = labels_of(cross_table_pairs(column_tables(repository.tables)), repository.joins).mean()
    assert trivial["average_precision"] == pytest.approx(share, abs=0.02)
    with pytest.raises(UserError, match="unknown arm 'nothing'"):
        recipe.arm("nothing", 0)


def test_the_benchmarks_reference_is_the_layer():
    layer, edges = recipe.benchmarks()
    np.testing.assert_allclose(layer.fn(*layer.args), layer.baselines["numpy_loop"](*layer.args), atol=1e-3)
    near = edges.baselines["python_sort"](*edges.args)
    src, _, _, mask = edges.fn(*edges.args)
    assert mask.all()
    found = np.asarray(src).reshape(300, 5, 3)
    assert [[x for x, _ in near[7][r]] for r in range(5)] == found[7].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"k": 0}, "--k must be at least 1"),
        ({"margin": -0.1}, "--margin must not be negative, got -0.1"),
        ({"batch_size": -1}, "--batch-size must not be negative"),
        ({"num_bases": 6}, "--num-bases 6 exceeds the 5 relations"),
        ({"threshold": 1.5}, r"--threshold must be in \[0, 1\]"),
        ({"iterations": 0}, "--iterations must be at least 1, got 0"),
        ({"typo_share": 2.0}, r"--typo-share must be in \[0, 1\], got 2.0"),
        ({"common": (3, 1)}, "--common must be a range from 1 up, got 3 .. 1"),
        ({"overlaps": (1.0,)}, r"--overlaps are shares of the rows in \[0, 1\)"),
        ({"labels": "x.csv"}, "--labels 'x.csv' belongs to --data.path"),
        ({"data": Data("cities")}, "--data.name 'cities' is unknown; use domains, bundled, or --data.path DIR"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        recipe.Recipe(**change).build()


def test_bad_tables_are_refused(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("x\n1\n2\n3\n")
    with pytest.raises(DataError, match="joins are discovered between at least two tables"):
        recipe.Recipe(data=Data(path=str(tmp_path))).build()
    (tmp_path / "b.csv").write_text("y\n4\n5\n6\n")
    path = Data(path=str(tmp_path))
    # one column a table: a cut pair has no other columns, hence no negatives
    with pytest.raises(UserError, match="no join pair has a known non-join partner"):
        recipe.Recipe(data=path).build()
    with pytest.raises(UserError, match="0 non-joins: both are needed"):
        recipe.Recipe(data=path, objective="rgcn_cross_entropy").build()
    (tmp_path / "v.vec").write_text("word 1 2\nother 1\n")
    for file in ("a.csv", "b.csv"):
        (tmp_path / file).write_text("x,y,z\n" + "".join(f"{i},{file}{i},w{i}\n" for i in range(9)))
    with pytest.raises(DataError, match="v.vec, line 2: 1 numbers, expected 2"):
        recipe.Recipe(data=path, vectors=str(tmp_path / "v.vec")).build()
    says = ("a.csv, line 2", "4 cells")
    (tmp_path / "a.csv").write_text("x,y,z\n1,2,3,4\n")
    refused(capsys, "train", "omnimatch", "--data.path", tmp_path, "--workdir", tmp_path / "run", says=says)
    for file in ("a.csv", "b.csv"):
        (tmp_path / file).write_text("x,y\n1,2\n")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(UserError, match="no table has enough rows"):
        recipe.Recipe(data=path).build()


def test_the_example_covers_the_objective():
    found = recipe.example()
    objective, batch = found["objective"], {k: jnp.asarray(v) for k, v in found["batch"].items()}
    variables = objective.init(jax.random.key(0), batch)
    context = Context(rng=jax.random.key(0))
    outputs, _ = objective.forward(variables, batch, context)
    assert float(reduce_mean(objective.loss(outputs, batch, context).elements)) > 0.01
    assert NUM_FEATURES == 987


@pytest.mark.claim
def test_the_claim():
    import zoo
    from trainers.claims import run_claim

    found = run_claim(zoo.card("omnimatch"), 5)
    assert found["verdict"] != "contradicted", json.dumps(found["paired"])
