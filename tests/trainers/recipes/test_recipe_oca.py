"""oca's recipe: its run and what it leaves, chained updates, old models from elsewhere, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.model import load_model, save_model
from data.dataset import Dataset
from data.images import digits
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.phases import Alternate
from trainers.protocols import compatibility_of
from trainers.recipe import Optimizer, UserError
from trainers.recipes.representation import oca as recipe
from trainers.run import train, train_in_memory
from zoo.nn.basis_transformation import BasisTransformation
from zoo.nn.mlp import MLP
from zoo.ops.lineage import comparable, lineage
from zoo.representation import oca as method

TINY = {"epochs": 1, "old_dim": 6, "extra": 2, "batch_size": 64}
QUICK = Settings(Parallel(devices=1), 1, save_every=10**6)


def small():
    """A few images of every digit."""
    data = digits()
    return Dataset("digits", {k: {f: v[:200] for f, v in s.items()} for k, s in data.splits.items()}, data.info)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole run on the digits, of the method alone."""
    work, made = tmp_path_factory.mktemp("run"), recipe.Recipe(**TINY, baselines=())
    return made, train("oca", made, work, QUICK, progress=False), work


def test_a_run_measures_and_draws(done):
    _, found, work = done
    metrics = found["metrics"]
    assert (
        found["summary"].startswith("top-1: old in old ")
        and "OCA: new queries in the gallery of old" in found["summary"]
    )
    assert "comparable" not in found["summary"] and metrics["oca1_gallery/incomparable"] == 0
    for name in ("", "_top5", "_map"):
        assert 0 < metrics[f"oca1_gallery/against_old{name}"] <= metrics[f"oca1_gallery/against_oca1{name}"] <= 1
    assert metrics["oca1_prototypes/smallest_class"] > 100
    assert (work / "compatibility.png").stat().st_size > 5000


def test_the_exported_model_has_no_orthogonal_layer_and_searches_the_old_gallery(done):
    _, found, work = done
    model = load_model(work / "model")
    net, test = model.definition, digits()["test"]
    assert net == method.PlainEmbedding(MLP((128,), 64), 8, 10, True) and "orthogonal" not in model.variables["params"]
    assert model.info["preprocessing"]["blocks"] == [6, 8]
    own = {k: v for k, v in model.variables.items() if k != "constants"}
    out = net.apply(own, jnp.asarray(test["x"]))
    accuracy = np.mean(np.argmax(out["logits"], 1) == test["label"])
    assert accuracy == pytest.approx(found["metrics"]["test/accuracy"], abs=1e-6)
    with np.load(work / "artefacts" / "old_gallery" / "gallery_old.npz") as stored:
        kept = {k.lstrip("/"): stored[k] for k in stored.files}
    assert kept["features"].shape == (360, 6)
    q = np.asarray(out["h_new"])[:, :6]
    s = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ kept["features"].T
    np.fill_diagonal(s, -np.inf)
    top = np.mean(test["label"][s.argmax(1)] == test["label"])
    assert top == pytest.approx(found["metrics"]["oca1_gallery/against_old"], abs=4e-3)
    old = {k.split("/")[-1]: v for k, v in kept.items() if "lineage" in k}
    assert comparable(model.variables["constants"]["lineage"], old)


def test_prototypes_are_the_old_models_normalised_means(done):
    _, _, work = done
    load = lambda name, file: {k: v for k, v in np.load(work / "artefacts" / name / f"{file}.npz").items()}  # noqa: C416, E731
    (found,) = load("oca1_prototypes", "oca1_prototypes").values()
    kept = load("old_gallery", "model_old")
    train = digits()["train"]
    x = train["x"].reshape(len(train["x"]), -1)
    get = lambda *path: next(v for k, v in kept.items() if k.strip("/").endswith("/".join(path)))  # noqa: E731
    h = np.maximum(x @ get("hidden1", "kernel") + get("hidden1", "bias"), 0) @ get("out", "kernel") + get("out", "bias")
    z = h @ get("head", "fc", "kernel")
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(found, [z[train["label"] == c].mean(0) for c in range(10)], atol=1e-4)


def test_every_method_follows_the_same_old_model():
    run = recipe.Recipe(**TINY, baselines=("bt2", "independent", "bct")).on(small())
    names = [p.name for p in run.phases]
    trained = [p.name for p in run.phases if isinstance(p, Alternate)]
    assert trained == ["old", "independent1", "bct1", "bt21", "oca1"]
    assert names.count("old_gallery") == 1 and names[-2:] == ["oca_compatibility", "test"]
    found = train_in_memory(run)
    matrices = {a: compatibility_of(found.artefacts, ["old", f"{a}1"]) for a in ("independent", "bct", "bt2", "oca")}
    assert len({m[0, 0] for m in matrices.values()}) == 1
    assert matrices["independent"][1, 0] < 0.35
    assert found.artefacts["gallery_bct1"]["features"].shape[1] == 6
    assert found.artefacts["gallery_bt21"]["features"].shape[1] == 8
    assert [found.metrics[f"{a}1_gallery/incomparable"] for a in ("independent", "bct", "bt2", "oca")] == [1, 0, 0, 0]
    assert "; independent: not trained to be comparable with every older gallery" in run.summary(found.metrics)


@pytest.mark.parametrize("succeed", ["full", "first"])
def test_a_third_model(succeed):
    made = recipe.Recipe(**TINY, known=(4, 7, 10), baselines=(), succeed=succeed)
    nets = [made._network("oca", t) for t in range(3)]
    assert [n.features for n in nets] == [6, 8, 10] and [n.num_classes for n in nets] == [4, 7, 10]
    assert nets[2].d_old == (8 if succeed == "full" else 6)
    found = train_in_memory(made.on(small()))
    assert [found.artefacts[f"oca{t}_prototypes"].shape for t in (1, 2)] == [(7, 6), (10, nets[2].d_old)]
    assert found.metrics["oca2_gallery/incomparable"] == (0 if succeed == "full" else 1)
    records = {n: found.artefacts[f"gallery_{n}"]["lineage"] for n in ("old", "oca1", "oca2")}
    assert comparable(records["oca2"], records["old"])
    parent = records["oca1" if succeed == "full" else "old"]
    np.testing.assert_array_equal(records["oca2"]["parents"][0], parent["id"])
    assert "oca2_gallery/against_oca1" in found.metrics


def test_sizes_of_chained_bt2():
    made = recipe.Recipe(**TINY, known=(4, 7, 10), baselines=("independent",), method="bt2")
    first, second = made._network("bt2", 1), made._network("bt2", 2)
    assert (first.d_old, first.features, first.extra) == (6, 6, 2)
    assert (second.d_old, second.features, second.extra) == (8, 6, 4) and isinstance(second, BasisTransformation)


def test_an_old_model_from_elsewhere(tmp_path, done):
    _, _, work = done
    options = {**TINY, "old_dim": 8, "baselines": ("bct",), "old": str(work), "known": (5, 10)}
    run = recipe.Recipe(**options).on(small())
    assert [p.name for p in run.phases if isinstance(p, Alternate)] == ["bct1", "oca1"]
    found = train_in_memory(run)
    stored = load_model(work / "model").variables["constants"]["lineage"]
    for k, v in stored.items():
        np.testing.assert_array_equal(found.artefacts["gallery_old"]["lineage"][k], v)
    assert found.metrics["oca1_gallery/incomparable"] == 0
    assert found.artefacts["gallery_oca1"]["features"].shape[1] == 10

    def refused(network, words, constants=None, **changed):
        variables = network.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
        save_model(tmp_path / "m", network, {**variables, "constants": constants or {}}, {}, {})
        with pytest.raises(UserError, match=words):
            recipe.Recipe(**{**options, "old": str(tmp_path / "m"), **changed}).build()

    known = {"lineage": lineage(jnp.ones(2), {})}
    plain = method.PlainEmbedding(MLP((4,), 4), 64, 5)
    refused(plain, "old model yields 64-d features, expected 128; set --old-dim 64", known, old_dim=128)
    refused(method.PlainEmbedding(MLP((4,), 4), 8, 5), "has no lineage")
    save_model(tmp_path / "mlp", MLP((4,), 4), MLP((4,), 4).init(jax.random.key(0), jnp.ones((1, 3))), {}, {})
    with pytest.raises(UserError, match="is a MLP; a model exported by zoo train oca is needed"):
        recipe.Recipe(**{**options, "old": str(tmp_path / "mlp")}).build()
    with pytest.raises(UserError, match="--old nowhere"):
        recipe.Recipe(**{**options, "old": "nowhere"}).build()


def test_galleries_of_another_model_are_refused():
    made = recipe.Recipe(**TINY, known=(4, 7, 10))
    q, g = made._align(jnp.ones((2, 10)), jnp.ones((3, 8)))
    assert q.shape == (2, 8) and g.shape == (3, 8)
    made._align(jnp.ones((2, 8)), jnp.ones((3, 10)))
    with pytest.raises(ValueError, match="holds 7-d vectors, but the query model's compatible blocks end at 6, 8, 10"):
        made._align(jnp.ones((2, 10)), jnp.ones((3, 7)))


def test_coupled_weight_decay():
    params = {"w": jnp.full(2, 2.0)}
    tx = recipe._optimizer(Optimizer("adam", 0.1, weight_decay=0.5), 10)
    state = tx.init(params)
    step, _ = tx.update({"w": jnp.array([-1.0, 1.0])}, state, params)  # gradients become 0 and 2
    np.testing.assert_allclose(step["w"], [0.0, -0.1], atol=1e-6)
    assert recipe.Recipe().optimizer.weight_decay == 3.0517578125e-5


def test_arms(monkeypatch):
    monkeypatch.setattr(recipe, "Recipe", functools.partial(recipe.Recipe, **TINY))
    found, other = recipe.arm("untrained", 0), recipe.arm("oca", 0)
    assert set(found) == set(other) and found["new_old"] < 0.4 and recipe.arm("untrained", 1) != found
    assert other["gain"] == pytest.approx(other["new_old"] - other["old_old"])
    with pytest.raises(UserError, match="unknown arm 'x'"):
        recipe.arm("x", 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"extra": 0}, "--extra must be at least 1, got 0"),
        ({"old_dim": 0}, "--old-dim must be at least 1, got 0"),
        ({"alpha": -1.0}, "--alpha must not be negative"),
        ({"weights": (5.0, -1.0, 5.0)}, "--weights must not be negative"),
        ({"smoothing": 1.0}, r"--smoothing must lie in \[0, 1\), got 1.0"),
        ({"known": (10,)}, "--known 10 must ascend from at least 2 to at most 10"),
        ({"known": (5, 5)}, "--known 5 5 must ascend"),
        ({"known": (1, 5)}, "--known 1 5 must ascend"),
        ({"known": (5, 11)}, "to at most 10, the classes of 'digits'"),
        ({"baselines": ("moco",)}, "--baselines moco: choose from independent, bct, bt2, oca"),
        ({"baselines": ("bt2",)}, "bt2 learns from independently trained models; add independent to --baselines"),
        ({"method": "bt2", "extra": 7}, "bt2 cannot append more than --old-dim 6 coordinates; lower --extra"),
        ({"encoders": ()}, "--encoders : choose from mlp, wide"),
        ({"encoders": ("vit",)}, "--encoders vit: choose from mlp, wide"),
        ({"optimizer": Optimizer(learning_rate=0.0)}, "--optimizer.learning-rate must be positive"),
        ({"optimizer": Optimizer(weight_decay=-1.0)}, "--optimizer.weight-decay must not be negative"),
    ],
)
def test_settings_that_cannot_work(options, words):
    with pytest.raises(UserError, match=words):
        recipe.Recipe(**{**TINY, **options}).build()


def test_data_that_cannot_work():
    with pytest.raises(UserError, match="has no field 'label'"):
        recipe.Recipe(**TINY).on(Dataset("bare", {"train": {"x": np.zeros((3, 8, 8, 1))}, "test": {}}))
    data = small()
    keep = ~np.isin(data["train"]["label"], (6, 8))
    splits = {**data.splits, "train": {k: v[keep] for k, v in data["train"].items()}}
    run = recipe.Recipe(**TINY, baselines=()).on(Dataset("digits", splits, data.info))
    with pytest.raises(UserError, match="oca1_prototypes: no image of class 6, 8: a prototype needs at least one"):
        train_in_memory(run)
