"""invariance_augment's recipe: its run and what it leaves, its claim's arms, and the settings it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import refused

from checkpoints.model import load_model
from data.stream import DataError
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.representation import invariance_augment as recipe
from trainers.run import train
from zoo.base import Context
from zoo.nn.mlp import MLP
from zoo.objectives import supervised
from zoo.ops.augmentation import sample_transform

SMALL = {"epochs": 2, "hidden": 8}


def test_a_run_leaves_a_model_and_pictures(tmp_path):
    settings = recipe.Recipe(**SMALL, epsilon=0.01)
    found = train("invariance_augment", settings, tmp_path, Settings(Parallel(devices=1)), progress=False)
    assert {"test/accuracy", "turned/accuracy", "train/gamma", "train/constraint"} <= set(found["metrics"])
    assert (tmp_path / "augmentation.png").stat().st_size > 5000 and (tmp_path / "curves.png").exists()
    # 8 steps, all of them violations: gamma has risen for more than an epoch, and the user is told
    assert "gamma has grown at each of the last 7 steps" in found["summary"] and "raise epsilon" in found["summary"]
    model = load_model(tmp_path / "model")
    data = settings.load()
    logits = model.definition.apply(model.variables, jnp.asarray(2 * data["test"]["x"] - 1))
    accuracy = float(np.mean(np.argmax(np.asarray(logits), -1) == data["test"]["label"]))
    assert found["metrics"]["test/accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert "invariance" not in model.variables


def test_a_slack_constraint_is_no_warning():
    run = recipe.Recipe(**SMALL).build()
    metrics = {"test/accuracy": 0.5, "turned/accuracy": 0.5, "train/gamma": 0.1, "train/constraint": 0.2}
    assert "warning" not in run.summary({**metrics, "train/epochs_rising": 0.75})
    assert "warning" in run.summary({**metrics, "train/epochs_rising": 1.0})
    fixed = recipe.Recipe(**SMALL, dual_rate=0.0, dual_start=1.0).build()
    assert "warning" not in fixed.summary({**metrics, "train/epochs_rising": 1.0})


def test_images_of_your_own(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "own.npz"
    np.savez(file, x=rng.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8), label=rng.integers(0, 3, 40))
    data = recipe.Recipe(data=Data(path=str(file))).load()
    assert data["train"]["x"].min() >= 0 and data["train"]["x"].max() <= 1 and data["train"]["x"].shape[1:] == (8, 8, 3)
    with np.load(file) as f:
        np.savez(tmp_path / "bare.npz", x=f["x"])
    with pytest.raises(UserError, match="no field 'label'"):
        recipe.Recipe(data=Data(path=str(tmp_path / "bare.npz"))).load()
    np.savez(tmp_path / "four.npz", x=np.zeros((9, 8, 8, 4), np.uint8), label=np.zeros(9, int))
    with pytest.raises(UserError, match="1 or 3"):
        recipe.Recipe(data=Data(path=str(tmp_path / "four.npz"))).load()
    with pytest.raises(DataError, match="no such file"):
        recipe.Recipe(data=Data(path=str(tmp_path / "none"))).load()
    assert recipe.Recipe(data=Data("digits")).load()["train"]["x"].shape == (1437, 8, 8, 1)
    moved = recipe.Recipe(data=Data("moved_digits"))
    assert [p.name for p in moved.build().phases] == ["train", "test"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--epsilon", "0"), ("epsilon must be above 0", "--dual-rate 0")),
        (("--proposals", "0"), ("--proposals", "at least 1")),
        (("--chains", "0"), ("--chains", "at least 1")),
        (("--epochs", "0"), ("--epochs",)),
        (("--dual-rate", "-1"), ("--dual-rate",)),
        (("--dual-start", "-1"), ("--dual-start",)),
        (("--crop", "-1"), ("--crop",)),
        (("--cutout", "-1"), ("--cutout",)),
        (("--sample", "--chains", "2"), ("chains=2",)),
        (("--data.name", "mixture"), ("expect",)),
    ],
)
def test_settings_that_cannot_work_are_one_line(capsys, tmp_path, options, says):
    refused(capsys, "train", "invariance_augment", "--workdir", tmp_path / "run", *options, says=says)


def test_a_padded_crop_by_hand():
    image = jnp.arange(1.0, 10.0).reshape(3, 3, 1)
    seen = {recipe.crop_padded(k, image, 1).tobytes() for k in jax.random.split(jax.random.key(0), 200)}
    wide = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)))
    assert seen == {wide[i : i + 3, j : j + 3].tobytes() for i in range(3) for j in range(3)}


def test_the_published_views():
    views = recipe.Recipe(crop=4, flip=True, cutout=16, space="fixed").views()
    image = jnp.ones((32, 32, 3))
    out = np.asarray(views.view(jax.random.key(3), image))
    assert set(np.unique(out)) <= {-1.0, 0.0, 1.0} and (out == 0).any()
    np.testing.assert_array_equal(views.plain(image), 1.0)
    plain = recipe.Recipe().views()
    assert plain.base is None and plain.erase is None and plain.space.rotate == 180


def test_the_uniform_baseline_transforms_every_image_once():
    views = recipe.Recipe().views()
    host = supervised(MLP((4,), 2))
    objective = recipe.augmented_only(host, views)
    batch = {
        "x": jnp.asarray(np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32)),
        "row": jnp.arange(5),
    }
    variables = host.init(jax.random.key(0), batch)
    context = Context(jax.random.key(1))
    found = objective.forward(variables, batch, context)[0]["logits"]
    keys, draws = (context.example_keys(batch, n) for n in ("views", "transforms"))
    seen = [views.view(keys[i], batch["x"][i], sample_transform(draws[i], views.space)) for i in range(5)]
    expected = host.forward(variables, {**batch, "x": jnp.stack(seen)}, context)[0]["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    still = objective.forward(variables, batch, context.replace(train=False))[0]["logits"]
    expected = host.forward(variables, {**batch, "x": 2 * batch["x"] - 1}, context)[0]["logits"]
    np.testing.assert_allclose(still, expected, rtol=1e-5, atol=1e-6)


def test_arms_and_networks(monkeypatch):
    monkeypatch.setattr(recipe, "Recipe", lambda seed: dataclasses.replace(small, seed=seed))
    small = dataclasses.replace(_recipe(), **SMALL)
    found = {a: recipe.arm(a, 0) for a in recipe.ARMS}
    assert all(0 <= f["accuracy"] <= 1 for f in found.values())
    assert found["constrained"]["gamma_highest"] > 0 and 0 < found["constrained"]["rotate_share"] < 1
    with pytest.raises(UserError, match="unknown arm"):
        recipe.arm("constraint", 0)


def test_wide_networks_are_built():
    data = recipe.Recipe().load()
    net = _recipe(encoder="wrn10-1").network(data)
    out = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), jnp.zeros((2, 12, 12, 1)))[0])
    assert out.shape == (2, 2)


_recipe = recipe.Recipe
