"""dbnorm's recipe: runs on files and generated pairs, what they export, the claim's arms, and refused settings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.model import load_model
from data.retrieval_pairs import hub_pairs
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.retrieval import dbnorm as recipe
from trainers.run import train
from zoo.retrieval import dbnorm


def run(into, **change):
    made = recipe.Recipe(**{"compare": False, **change})
    return train("dbnorm", made, into, Settings(Parallel(devices=1)), progress=False)["metrics"]


def unit(rng, *shape):
    x = rng.normal(size=shape) + 0.5
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same problem as embeddings and as similarity matrices: 14 captions of 5 items."""
    rng = np.random.default_rng(0)
    arrays = {"queries": unit(rng, 14, 6), "gallery": unit(rng, 5, 6), "query_bank": unit(rng, 12, 6)}
    arrays["gallery_bank"] = unit(rng, 11, 6)
    items = np.sort(rng.integers(0, 5, 14))
    g = arrays["gallery"]
    sims = {"S": arrays["queries"] @ g.T, "S_bq": arrays["query_bank"] @ g.T, "S_bg": arrays["gallery_bank"] @ g.T}
    roots = []
    for name, kept in (("vectors", {k: 3 * v for k, v in arrays.items()}), ("matrices", sims)):
        root = tmp_path_factory.mktemp(name)
        for k, v in {**kept, "caption_item": items}.items():
            np.save(root / f"{k}.npy", v)
        roots.append(root)
    return (*roots, sims, items)


def measured(scores, items, depth=3):
    """R@1, R@5 and skewness by loops."""
    ranks = [sum(row > row[i]) + (sum(row == row[i]) - 1) / 2 for row, i in zip(scores, items, strict=True)]
    counts = np.bincount(np.argsort(-scores, 1, kind="stable")[:, :depth].ravel(), minlength=scores.shape[1])
    centred = counts - counts.mean()
    return np.mean(np.equal(ranks, 0)), np.mean(np.less(ranks, 5)), np.mean(centred**3) / np.mean(centred**2) ** 1.5


@pytest.mark.slow
def test_vectors_and_matrices_are_one_problem(folders, tmp_path):
    vectors, matrices, sims, items = folders
    found = [
        run(tmp_path / p.name, data=Data(path=str(p)), neighbours=4, depth=3, beta1=8.0, beta2=2.0)
        for p in (vectors, matrices)
    ]
    lse = lambda x: np.log(np.exp(x).sum(0))  # noqa: E731
    scores = 10 * sims["S"] - lse(8 * sims["S_bq"]) - lse(2 * sims["S_bg"])
    for metrics in found:
        for prefix, s in (("raw_", sims["S"]), ("", scores)):
            names = ("recall_at_1", "recall_at_5", "skewness")
            got = [metrics[f"measure/{prefix}{name}"] for name in names]
            np.testing.assert_allclose(got, measured(s, items), rtol=1e-4, atol=1e-5)
        assert metrics["fit/items"] == 5 and metrics["fit/query_bank"] == 12 and metrics["fit/gallery_bank"] == 11
        assert metrics["fit/bytes_per_item"] == 8
    for p in (vectors, matrices):
        assert (tmp_path / p.name / "hubs.png").stat().st_size > 1000
        model = load_model(tmp_path / p.name / "model")
        fitted = dbnorm.calibrator_from_arrays(model.definition, model.variables["calibrator"])
        assert model.definition == dbnorm.CalibratorConfig("dualis", 5, 4)
        got = dbnorm.apply(fitted, jnp.asarray(sims["S"], jnp.float32))
        np.testing.assert_allclose(got, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_every_normaliser_runs_and_is_compared(folders, tmp_path):
    path = Data(path=str(folders[0]))
    for name in ("identity", "dis", "gc", "csls", "dualdis"):
        metrics = run(tmp_path / name, data=path, neighbours=4, depth=3, normaliser=name, compare=name == "dis")
        assert 0 <= metrics["measure/recall_at_1" if name != "identity" else "measure/raw_recall_at_1"] <= 1
        assert ("measure/sinkhorn_recall_at_1" in metrics) == (name == "dis")
        assert ("fit/active_q" in metrics) == ("dis" in name)
    back = run(tmp_path / "back", data=path, neighbours=4, depth=3, direction="reverse")
    assert back["fit/items"] == 14 and back["fit/query_bank"] == 11 and back["fit/gallery_bank"] == 12


def test_reverse_asks_with_items_for_their_nearest_caption(folders):
    vectors, _, sims, items = folders
    made = recipe.Recipe(data=Data(path=str(vectors)), direction="reverse", normaliser="identity")
    side = made._sides(made._data())
    values, counts = made.measure({k: jnp.asarray(v) for k, v in side.items()}, None, "identity")
    scores = sims["S"].T
    first = [items[row.argmax()] == i for i, row in enumerate(scores) if (items == i).any()]
    np.testing.assert_allclose(values["recall_at_1"], sum(first) / 5, rtol=1e-6)
    np.testing.assert_array_equal(counts, np.bincount(np.argsort(-scores, 1)[:, :10].ravel(), minlength=14))


def test_measuring_in_blocks_is_measuring_at_once():
    data = hub_pairs(0, pairs=300, bank=40, dimension=8)
    made = recipe.Recipe(normaliser="is")
    side = {k: jnp.asarray(v) for k, v in made._sides(data).items()}
    values, counts = jax.jit(lambda a: made.measure(a, None, "is"))(side)  # blocks of 256
    s = np.asarray(side["queries"]) @ np.asarray(side["gallery"]).T
    t = np.asarray(side["query_bank"]) @ np.asarray(side["gallery"]).T
    scores = 20 * s - np.log(np.exp(20 * t).sum(0))
    np.testing.assert_allclose(values["recall_at_1"], np.mean(scores.argmax(1) == np.arange(300)), atol=1e-6)
    assert int(counts.sum()) == 3000


def test_banks_are_cut_by_the_seed():
    rows = [recipe.Recipe(seed=s, query_bank_size=7)._sides(hub_pairs(0))["query_bank"] for s in (0, 0, 1)]
    assert rows[0].shape == (7, 32)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()


def test_arms_are_paired_and_named():
    found = {a: recipe.arm(a, 3) for a in recipe.ARMS}
    data = hub_pairs(3)
    s = data["queries"]["emb"] @ data["gallery"]["emb"].T
    assert found["raw similarity"]["recall_at_1"] == pytest.approx(np.mean(s.argmax(1) == np.arange(500)), abs=1e-6)
    lse = lambda beta, bank: np.log(np.exp(beta * bank @ data["gallery"]["emb"].T).sum(0))  # noqa: E731
    few = lse(20, data["query_bank"]["emb"][:50])
    for name, scores in (
        ("IS (20)", 20 * s - few),
        ("DualIS (20, 5)", 25 * s - few - lse(5, data["gallery_bank"]["emb"])),
    ):
        assert found[name]["recall_at_1"] == pytest.approx(np.mean(scores.argmax(1) == np.arange(500)), abs=0.003)
    assert found["IS (20)"]["full_recall_at_1"] > found["raw similarity"]["full_recall_at_1"]
    assert found["IS (20)"]["shifted_recall_at_1"] != found["IS (20)"]["full_recall_at_1"]
    assert (
        found["raw similarity"]["full_skewness"]
        > found["IS (20)"]["full_skewness"]
        > found["DualIS (20, 5)"]["full_skewness"]
    )
    with pytest.raises(UserError, match="unknown arm 'nothing'"):
        recipe.arm("nothing", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta1": 0.0}, "--beta1 must be a positive number, got 0"),
        ({"beta2": -1.0}, "--beta2 must be a positive number, got -1"),
        ({"k": 501}, r"--k must be in \[1, 500\], the items of the gallery; got 501"),
        ({"neighbours": 1001}, r"--neighbours must be in \[1, 1000\], the query bank; got 1001"),
        ({"query_bank_size": 1001}, r"--query-bank-size must be in \[0, 1000\] \(0 for all\), got 1001"),
        ({"shifted": 1.5}, r"--shifted must be in \[0, 1\]"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"depth": 0}, "--depth must be at least 1, got 0"),
        ({"chunk": 0}, "--chunk must be at least 1, got 0"),
        ({"data": Data("msrvtt")}, "--data.name 'msrvtt' is unknown; use hubs, or --data.path DIR"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        recipe.Recipe(**change).build()


def test_missing_halves_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="--direction reverse needs embeddings"):
        recipe.Recipe(data=Data(path=str(folders[1])), direction="reverse").build()
    for name in ("queries", "gallery", "query_bank", "caption_item"):
        np.save(tmp_path / f"{name}.npy", np.load(folders[0] / f"{name}.npy"))
    data = Data(path=str(tmp_path))
    with pytest.raises(UserError, match="--normaliser dualis needs a gallery bank"):
        recipe.Recipe(data=data).build()
    with pytest.raises(UserError, match="needs gallery_bank.npy as their bank"):
        recipe.Recipe(data=data, direction="reverse", normaliser="is").build()
    np.save(tmp_path / "query_bank.npy", np.load(tmp_path / "queries.npy"))
    with pytest.warns(UserWarning, match="14 of 14 query bank samples are test queries themselves"):
        recipe.Recipe(data=data, normaliser="is").build()


@pytest.mark.claim
def test_the_claim():
    import zoo
    from trainers.claims import run_claim

    found = run_claim(zoo.card("dbnorm"), 10)
    assert found["verdict"] == "confirmed", json.dumps(found["paired"])
