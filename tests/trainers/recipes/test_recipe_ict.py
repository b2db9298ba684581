"""The ict recipe: what it builds, evaluates and draws, and what it refuses."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.images import digits
from trainers.recipe import Data, UserError
from trainers.recipes.diffusion import ict as recipe
from zoo.base import Context
from zoo.diffusion.ict import ConsistencyModel
from zoo.nn.denoisers import Mixer, ResidualMLP, UNet
from zoo.ops.noise_levels import Levels

TINY = recipe.Recipe(width=16, depth=1, steps=100, batch_size=64)


@pytest.fixture(scope="module")
def tiny():
    dataset = TINY.load()
    model = TINY.module(dataset)
    x = jnp.asarray(dataset["test"]["x"][:2])
    return dataset, model, jax.jit(model.init)(jax.random.key(0), x, jnp.ones(2))


def test_defaults_are_unconditional_digits_with_the_papers_range():
    model = recipe.Recipe().module(recipe.Recipe().load())
    assert isinstance(model.denoiser, ResidualMLP)
    assert model.denoiser.classes == 0
    assert (model.levels.sigma_min, model.levels.sigma_max, model.levels.rho) == (0.002, 80.0, 7.0)
    assert model.levels.sigma_data == pytest.approx(digits()["train"]["x"].std(), abs=1e-3)


def test_models_by_name_and_size():
    shape = lambda *s: dataclasses.replace(digits(), splits={"train": {"x": np.zeros(s, np.float32)}})  # noqa: E731
    build = lambda dataset, **kw: dataclasses.replace(TINY, sigma_data=0.5, **kw).module(dataset).denoiser  # noqa: E731
    assert isinstance(build(shape(4, 8, 8, 1), model="mixer"), Mixer)
    assert isinstance(build(shape(4, 28, 28, 1)), UNet)
    assert build(shape(4, 28, 28, 1)).attention == (7,)
    assert build(digits(), conditional=True).classes == 10
    assert build(digits(), dtype="bfloat16", dropout=0.2).rate == 0.2
    with pytest.raises(UserError, match="--model unet needs images"):
        build(shape(4, 2), model="unet")


def test_evaluation_covers_every_held_out_example_once(tiny):
    dataset, model, variables = tiny
    evaluation = recipe.samples_evaluation(model, dataset["test"], 100)
    seen, update = evaluation.init(), jax.jit(evaluation.update)
    for i in range(evaluation.stream.steps_per_epoch):
        context = Context(jax.random.key(i), train=False)
        seen, changed = update(seen, variables, evaluation.stream.batch(i), context)
    assert changed == {}
    # an untrained network is its skip: f(80 z, 80) = c_skip 80 z
    z = recipe.latents(jnp.arange(360), (8, 8, 1)).reshape(360, 64)
    sd = model.levels.sigma_data
    np.testing.assert_allclose(seen, z * 80 * sd**2 / ((80 - 0.002) ** 2 + sd**2), rtol=1e-3, atol=1e-6)
    metrics = evaluation.compute(np.asarray(seen))
    assert set(metrics) == {"sliced_w1", "mmd", "precision", "recall"}
    real = dataset["test"]["x"].reshape(360, -1)
    perfect = evaluation.compute(real)
    assert perfect["sliced_w1"] == pytest.approx(0, abs=1e-6)
    assert perfect["precision"] == perfect["recall"] == 1
    assert metrics["sliced_w1"] > 0.3


def test_latents_belong_to_the_example():
    z = recipe.latents(jnp.arange(6), (3, 2))
    np.testing.assert_array_equal(z[jnp.array([4, 1])], recipe.latents(jnp.array([4, 1]), (3, 2)))
    assert len(np.unique(np.asarray(z))) == 36


def test_sheet_places_every_image():
    images = np.arange(6).reshape(6, 1, 1, 1) / 10 * np.ones((6, 2, 3, 1))
    sheet = recipe.tile(images, 2, pad=1)
    assert sheet.shape == (8, 15)
    np.testing.assert_allclose(sheet[1:3, 6:9], 0.1)
    np.testing.assert_allclose(sheet[5:7, 1:4], 0.3)
    assert np.all(sheet[0] == -1)
    assert recipe.tile(np.zeros((4, 2, 2, 3)), 2).shape == (8, 8, 3)


@pytest.mark.parametrize("conditional", [False, True])
def test_pictures_are_drawn(tmp_path, tiny, conditional):
    dataset, _, _ = tiny
    settings = dataclasses.replace(TINY, conditional=conditional)
    model = settings.module(dataset)
    label = jnp.zeros(2, jnp.int32) if conditional else None
    v = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), jnp.ones(2), label)
    recipe.draw_samples(types.SimpleNamespace(chosen=v), tmp_path, settings, model, dataset["test"])
    assert (tmp_path / "samples.png").stat().st_size > 5000


def test_points_are_drawn(tmp_path):
    model = ConsistencyModel(ResidualMLP(8, 1, condition=8), Levels())
    v = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 2)), jnp.ones(2))
    test = {"x": np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)}
    recipe.draw_samples(types.SimpleNamespace(chosen=v), tmp_path, TINY, model, test)
    assert (tmp_path / "samples.png").stat().st_size > 5000


def test_build_holds_together():
    run = TINY.build()
    (phase,) = run.phases
    assert phase.steps == 100
    assert phase.average.decay == 0.999
    assert run.data_fingerprint == digits().fingerprint
    assert "0.1230" in run.summary({"samples/sliced_w1": 0.123})
    export = run.export({"params": {"a": 1}, "constants": {"b": 2}, "teacher": {"c": 3}}, {})
    assert set(export.variables) == {"params", "constants"}
    assert isinstance(export.definition, ConsistencyModel)
    original = dataclasses.replace(TINY, original=True).build().phases[0].updates["main"].objective
    assert original.name == "ct"


def test_example_row():
    row = recipe.example()
    assert row["batch"]["x"].shape[0] == row["num_examples"] == 16
    assert set(recipe.fields()) == {"x", "label"}


def test_what_it_refuses(tmp_path):
    for changes, message in (
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"width": 0}, "--width must be at least 1"),
        ({"steps": 3}, r"total_steps // stages is 0"),
        ({"s0": 20, "s1": 10}, "1 <= s0 <= s1, got s0=20, s1=10"),
        ({"sigma_mid": 90.0}, r"--sigma-mid must lie in \(0.002, 80\], got 90"),
        ({"sigma_data": -1.0}, "--sigma-data must be positive"),
        ({"average": 1.0}, r"--average must lie in \[0, 1\), got 1"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(TINY, **changes).load()
    with pytest.raises(UserError, match=r"--dropout must lie in \[0, 1\), got 1"):
        dataclasses.replace(TINY, dropout=1.0).module(digits())
    np.savez(tmp_path / "a.npz", x=np.zeros((10, 8, 8), np.uint8))
    with pytest.raises(UserError, match="--conditional needs labels"):
        dataclasses.replace(TINY, conditional=True, data=Data("mine", str(tmp_path / "a.npz"))).load()
    with pytest.raises(UserError, match="unknown arm 'itc'; did you mean 'ict'"):
        recipe.arm("itc", 0)


@pytest.mark.claim
def test_improved_training_beats_the_original_and_a_fitted_gaussian():
    found = {a: [recipe.arm(a, seed)["sliced_w1"] for seed in range(3)] for a in recipe.ARMS}
    assert np.mean(found["ict"]) + 0.01 < np.mean(found["ct"]) < np.mean(found["gaussian"])
