"""retrieval_extrapolation's recipe: trainings from one start, its report, its claim's arms, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.retrieval import retrieval_extrapolation as recipe
from trainers.run import train
from zoo.retrieval import retrieval_extrapolation as method


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    work = tmp_path_factory.mktemp("run") / "w"
    made = recipe.Recipe(steps=6, batch_size=16, buckets=2)
    return made, train("retrieval_extrapolation", made, work, Settings(Parallel(devices=1)), progress=False), work


def test_the_report_is_that_of_the_saved_values(done):
    made, found, work = done
    metrics, rows = found["metrics"], []
    for n in range(2):
        kept = np.load(work / "artefacts" / f"without{n}" / f"values_without{n}.npz")
        sides = {k.split("/")[-1]: kept[k][:-1] for k in kept.files}
        rows.append((sides["interpolation"], sides["extrapolation"]))
        assert metrics[f"without{n}/extrapolation"] == pytest.approx(sides["extrapolation"].mean())
    assert sum(len(b) for _, b in rows) == 600 and all(len(a) + len(b) == 600 for a, b in rows)
    want = method.report(rows)
    for name in ("interpolation", "extrapolation", "gap", "relative", "interpolation_pooled"):
        assert metrics[f"report/{name}"] == pytest.approx(getattr(want, name))
    assert (
        found["summary"].startswith("MRR@10: interpolation 0.") and (work / "extrapolation.png").stat().st_size > 5000
    )


def test_every_training_starts_from_the_same_weights_on_its_own_queries(done):
    made, *_ = done
    run = made.build()
    variables = run.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, variables["params"], variables["constants"]["start"])
    moved = {**variables, "params": jax.tree.map(lambda x: x + 1, variables["params"])}
    for phase in run.phases:
        if phase.name.endswith("_start"):
            back = phase.fit(moved, {}, jax.random.key(1)).variables["params"]
            jax.tree.map(np.testing.assert_array_equal, back, variables["params"])
    sizes = [p.updates["main"].stream.num_examples for p in run.phases if p.name.endswith("_training")]
    assert len(sizes) == 2 and sum(sizes) == 2400  # each training query is left out once


def test_restrain_on_texts_with_bm25_beside_it(tmp_path):
    made = recipe.Recipe(data=Data("synonyms"), protocol="restrain", size=40, test_size=20, steps=4, batch_size=16,
                         width=16, metric="ndcg", order="least_similar")  # fmt: skip
    found = train("retrieval_extrapolation", made, tmp_path / "w", Settings(Parallel(devices=1)), progress=False)
    metrics = found["metrics"]
    assert metrics["report/bm25_interpolation"] == metrics["report/bm25_extrapolation"] > 0.2
    assert {"near/interpolation", "far/extrapolation"} <= set(metrics) and "near/extrapolation" not in metrics
    assert metrics["report/gap"] == pytest.approx(metrics["far/extrapolation"] - metrics["near/interpolation"])
    assert "BM25 on the same queries" in found["summary"] and 0 <= metrics["report/label_overlap"] <= 1


def test_arms_measure_a_gap_where_there_is_one():
    untrained, random = recipe.arm("untrained dual encoder", 1), recipe.arm("random ranking", 1)
    assert abs(untrained["gap"]) < 0.03 and abs(random["gap"]) < 0.03
    assert untrained["gap"] == pytest.approx(untrained["interpolation"] - untrained["extrapolation"])
    with pytest.raises(UserError, match="unknown arm 'nothing'"):
        recipe.arm("nothing", 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"buckets": 1}, r"--buckets must be in \[2, 3000\], the number of queries; got 1"),
        ({"buckets": 0}, "--buckets must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"temperature": 0.0}, "--temperature must be positive, got 0.0"),
        ({"protocol": "restrain", "size": 3000}, "--size must be between 1 and the 2400 training queries"),
        ({"protocol": "restrain", "size": 1500}, r"only \d+ of 1500 queries are outside the top-\d+ neighbourhoods"),
        ({"data": Data("synonyms"), "width": 5000}, "--width 5000: features must be in"),
        ({"data": Data("cluster")}, "--data.name 'cluster' is unknown"),
    ],
)
def test_impossible_settings_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        recipe.Recipe(**change).build()


@pytest.mark.claim
def test_the_claim():
    import zoo
    from trainers.claims import run_claim

    found = run_claim(zoo.card("retrieval_extrapolation"), 5)
    assert found["verdict"] == "confirmed", json.dumps(found["paired"])
