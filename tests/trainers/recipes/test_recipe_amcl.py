"""amcl's recipe: a run on files with its plain host, its evaluation and picture, the hosts, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.model import load_model
from data.stream import DataError
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.representation import amcl as recipe
from trainers.run import train
from zoo.base import Context

TINY = {"steps": 3, "batch_size": 16, "heads": 2, "hidden": 6, "features": 4, "width": 8, "neighbours": 3, "queue": 32,
        "augmentations": "ae"}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Forty images of three classes, 6 x 6."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 40)
    x = rng.integers(0, 60, (40, 6, 6)) + 60 * label[:, None, None]
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, x=x.astype(np.uint8), label=label)
    return path


@pytest.fixture(scope="module")
def done(file, tmp_path_factory):
    made = recipe.Recipe(data=Data(path=str(file)), **TINY)
    work = tmp_path_factory.mktemp("run")
    return made, train("amcl", made, work, Settings(Parallel(devices=1)), progress=False), work


def test_a_run_judges_both_and_draws_pairs(done):
    _, found, work = done
    for name in ("plain", "amcl"):
        for metric in ("knn_accuracy", "probe_accuracy", "pair_auc"):
            assert 0 <= found["metrics"][f"{name}/{metric}"] <= 1
    assert found["summary"].startswith("plain simclr: kNN 0.") or found["summary"].startswith("plain simclr: kNN 1.")
    assert "simclr with 2 heads: kNN" in found["summary"]
    assert (work / "pairs.png").stat().st_size > 10_000


def test_the_model_is_the_encoder_alone(done, file):
    made, found, work = done
    model = load_model(work / "model")
    assert set(model.variables["params"]) == {"hidden1", "norm1", "out"} and "batch_stats" in model.variables
    data = recipe.image_dataset("", str(file))
    train_x, test_x = (model.definition.apply(model.variables, jnp.asarray(data[s]["x"])) for s in ("train", "test"))
    predicted = recipe.knn_classify(train_x, jnp.asarray(data["train"]["label"]), test_x, 3, 3)
    assert found["metrics"]["amcl/knn_accuracy"] == pytest.approx(np.mean(predicted == data["test"]["label"]))
    views = recipe.view_features(model.definition, model.variables, data["test"]["x"], made.stack())
    assert found["metrics"]["amcl/pair_auc"] == pytest.approx(recipe.pair_auc(*views), abs=1e-3)
    assert not np.allclose(*views)


def test_method_and_plain_host_start_alike(file):
    made = recipe.Recipe(data=Data(path=str(file)), **TINY)
    run = made.build()
    names = [p.name for p in run.phases]
    assert names == ["plain_training", "plain", "restart", "training", "amcl"]
    assert run.phases[0].updates["main"].loss_transform is None
    assert run.phases[3].updates["main"].loss_transform.name.startswith("amcl(contrastive)")
    first = run.init(jax.random.key(0))
    moved = jax.tree.map(lambda x: x + 1, first)
    again = run.phases[2].fit(moved, {}, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, again.variables, dict(first))
    assert again.artefacts["plain_views"].shape == (2, 4, 8)
    short = [p.name for p in dataclasses.replace(made, compare=False).build().phases]
    assert short == ["training", "amcl"]


@pytest.mark.parametrize(("host", "kind"), recipe.KINDS.items())
def test_every_host_fits_its_kind(host, kind, file):
    made = recipe.Recipe(data=Data(path=str(file)), host=host, compare=False, **TINY)
    phase = made.build().phases[0].updates["main"]
    assert phase.objective.name.replace(" ", "_") == host and kind in phase.objective.provides
    module = made.module()
    assert module.normalise == (host in ("simsiam", "barlow_twins"))
    assert (module.predictor > 0) == (host == "simsiam")
    assert module.temperature == ("table" if host == "barlow_twins" else "dot")
    fixed = dataclasses.replace(made, fixed_temperature=0.5)
    assert fixed.module().temperature == "none" and fixed.build() is not None


def test_temperatures_of_views_are_the_modules(file):
    made = recipe.Recipe(data=Data(path=str(file)), temperature_net="concat", **TINY)
    module = made.module()
    x = recipe.image_dataset("", str(file))["test"]["x"]
    variables = module.init(jax.random.key(0), jnp.asarray(x))
    sim, tau = recipe.pair_temperatures(module, variables, made, x, made.stack())
    assert sim.shape == tau.shape == (2, 4, 4) and np.abs(sim).max() <= 1 + 1e-5
    np.testing.assert_allclose(tau, (made.lower + made.upper) / 2, rtol=1e-5)  # an untrained network says 0
    bare = dataclasses.replace(made, fixed_temperature=0.5)
    assert recipe.pair_temperatures(bare.module(), variables, bare, x, made.stack()) is None


def test_similarities_of_pairs():
    first, second = np.asarray([[2.0, 0.0], [0.0, 1.0]]), np.asarray([[1.0, 0.0], [1.0, 1.0]])
    near, far = recipe.pair_similarities(first, second)
    np.testing.assert_allclose(near, [1, np.sqrt(0.5)], rtol=1e-6)
    np.testing.assert_allclose(far, [np.sqrt(0.5), 0], rtol=1e-6, atol=1e-7)
    assert recipe.pair_auc(first, second) == pytest.approx(3.5 / 4)


def test_views_of_the_evaluation_depend_on_the_image_only():
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 6, 6, 1)), jnp.float32)
    stack = recipe.Recipe(augmentations="ae").stack()
    views = jax.jit(lambda x, number: recipe.two_views(stack, x, number))
    whole, part = views(x, jnp.arange(4)), views(x[2:], jnp.arange(2, 4))
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_allclose(a[2:], b, atol=1e-6)
    assert not np.allclose(whole[0], whole[1])
    evaluation = recipe.judge(
        recipe.MLP((4,), 3), {"x": np.zeros((5, 6, 6, 1)), "label": np.arange(5) % 2},
        {"x": np.asarray(x), "label": np.arange(4) % 2}, stack, 16, 2, "e",
    )  # fmt: skip
    batch = jax.tree.map(jnp.asarray, evaluation.stream.batch(0))
    encoder = recipe.MLP((4,), 3)
    variables = {"params": {"encoder": encoder.init(jax.random.key(0), x)["params"]}}
    context = Context(jax.random.key(5), train=False)
    seen, _ = jax.jit(evaluation.update)(evaluation.init(), variables, batch, context)
    own = recipe.encoder_variables(variables)
    np.testing.assert_allclose(seen[5:, 0], encoder.apply(own, x), atol=1e-5)
    np.testing.assert_allclose(seen[5:, 2], encoder.apply(own, whole[1]), atol=1e-4)
    assert set(evaluation.compute(np.asarray(seen))) == {"knn_accuracy", "probe_accuracy", "pair_auc"}


def test_arms(file):
    made = recipe.Recipe(data=Data(path=str(file)), **TINY)
    found = recipe.arm("untrained_encoder", 1, made)
    assert set(found) == {"knn_accuracy", "probe_accuracy", "pair_auc"}
    with pytest.raises(UserError, match="unknown arm 'simclrr'; did you mean 'simclr'"):
        recipe.arm("simclrr", 0)


def test_fields_and_rows():
    assert set(recipe.fields()) == {"x", "label"}
    rows = recipe.example()
    assert set(rows["also"]) == {"moco", "simsiam", "barlow_twins"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 1}, "--batch-size 1: an image alone has no negatives"),
        ({"batch_size": 4000}, "--batch-size 4000 exceeds the 1437 images of 'digits'"),
        ({"heads": 0}, "--heads must be at least 1, got 0"),
        ({"neighbours": 0}, "--neighbours must be at least 1, got 0"),
        ({"lower": 0.0}, "--lower must be positive, got 0.0"),
        ({"lower": 2.0, "upper": 1.0}, "--upper must exceed lower"),
        ({"beta": -1.0}, "--beta must not be negative"),
        ({"fixed_temperature": -1.0}, "--fixed-temperature must be a positive temperature, got -1.0"),
        ({"temperature": 0.0}, "--temperature must be positive, got 0.0"),
        ({"augmentations": "abz"}, "--augmentations: augmentations are distinct letters of 'abcde', got 'abz'"),
        ({"smallest_crop": 0.0}, r"--smallest-crop must lie in \(0, 1\], got 0.0"),
        ({"strength": 1.5}, r"--strength must lie in \(0, 1\], got 1.5"),
        ({"host": "moco", "queue": 8}, "--queue 8 holds less than one batch of 128"),
        ({"host": "moco", "momentum": 1.0}, r"--momentum must lie in \[0, 1\), got 1.0"),
        ({"data": Data("mixture")}, r"'mixture' holds points of shape \(2,\); this recipe augments images"),
    ],
)
def test_settings_it_refuses(change, message):
    with pytest.raises(UserError, match=message):
        recipe.Recipe(**change).build()


def test_data_it_refuses(tmp_path):
    np.savez(tmp_path / "bare.npz", x=np.zeros((20, 4, 4), np.uint8))
    with pytest.raises(UserError, match="has no field 'label'"):
        recipe.Recipe(data=Data(path=str(tmp_path / "bare.npz"))).build()
    with pytest.raises(DataError, match="no such file or folder"):
        recipe.Recipe(data=Data(path=str(tmp_path / "none.npz"))).build()
