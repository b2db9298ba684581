"""The tcm recipe: both runs start alike, what it measures, its picture, and errors a user can mend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.images import digits
from trainers import embeddings
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, Optimizer, UserError
from trainers.recipes.representation import tcm as recipe_module
from trainers.recipes.representation.tcm import Recipe
from trainers.record import Record
from zoo.base import check_fit
from zoo.nn.mlp import MLP


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    recipe = Recipe(steps=4, hidden=8, features=4, far_low=0.05, far_high=0.3)
    run = recipe.build()
    record = Record()
    result = Loop(run, Settings(Parallel(devices=1), 1, 1, 10), record=record)()
    return recipe, run, result, record


def test_the_base_run_and_the_run_with_tcm_start_alike(ran):
    _, run, result, record = ran
    assert [p.name for p in run.phases] == ["base_training", "base", "tcm_training", "tcm"]
    first = {}
    for line in record.history:
        first.setdefault(line["phase"], line)
    assert first["base_training"]["loss"] == pytest.approx(first["tcm_training"]["loss_before"], rel=1e-6)
    added = first["tcm_training"]["loss"] - first["tcm_training"]["loss_before"]
    assert added == pytest.approx(first["tcm_training"]["tcm"], rel=1e-5) and added > 0
    base, mine = (result.artefacts[n]["embedding"] for n in ("base", "tcm"))
    assert base.shape == (640, 4) and not np.allclose(base, mine)


def test_what_is_measured_drawn_and_exported(ran, tmp_path):
    recipe, run, result, _ = ran
    found = recipe.measure(np.asarray(result.artefacts["tcm"]["embedding"]), recipe.load()["test"]["label"])
    assert 0 <= found["opis"] <= 0.25 and 0 <= found["recall@1"] <= 1 and found["classes_excluded"] == 0
    run.figures(result, tmp_path)
    assert (tmp_path / "thresholds.png").stat().st_size > 10_000
    text = run.summary({**{f"base/{k}": v for k, v in found.items()}, **{f"tcm/{k}": v for k, v in found.items()}})
    assert "OPIS" in text and "with TCM; see thresholds.png" in text
    export = run.export(result.variables, {})
    z = export.definition.apply(export.variables, jnp.ones((2, 48)))
    assert z.shape == (2, 4)


def test_either_half_alone():
    only = Recipe(steps=4, regulariser=False).build()
    assert [p.name for p in only.phases] == ["base_training", "base"]
    assert only.phases[0].updates["main"].loss_transform is None
    assert [p.name for p in Recipe(steps=4, compare=False).build().phases] == ["tcm_training", "tcm"]


@pytest.mark.parametrize("loss", embeddings.METRIC_LOSSES)
def test_every_base_loss_takes_tcm(loss):
    recipe = Recipe(loss=loss, hidden=4, features=4)
    host = embeddings.metric_host(loss, MLP((4,), 4), 5, 3)
    assert check_fit(recipe.transformation(), host) is not None
    batch = {"x": jnp.ones((4, 6)), "label": jnp.arange(4) // 2, "index": jnp.arange(4), "mask": jnp.ones(4, bool)}
    params = jax.eval_shape(lambda: host.init(jax.random.key(0), batch))["params"]
    assert set(embeddings.encoder_params(params)) == {"hidden1", "out"}


def test_class_vectors_may_have_their_own_rate():
    recipe = Recipe(loss="proxy_anchor", class_rate=100.0, optimizer=Optimizer("sgd", 0.1))
    tx = recipe.transformed_optimizer()
    params = {"encoder": {"w": jnp.ones(2)}, "proxies": jnp.ones(2)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert float(updates["encoder"]["w"][0]) == pytest.approx(-0.1)
    assert float(updates["proxies"][0]) == pytest.approx(-10)


def test_images_are_split_by_class():
    data = embeddings.open_world(digits(), 6)
    assert set(np.unique(data["train"]["label"])) == set(range(6)) and data.info["num_classes"] == 6
    whole = digits()
    held = sum(int((whole[s]["label"] >= 6).sum()) for s in ("train", "test"))
    assert len(data["test"]["x"]) == held and set(np.unique(data["test"]["label"])) == set(range(4))


def test_batches_hold_classes_by_number_each():
    recipe = Recipe(data=Data("digits"), classes_per_batch=8, per_class=3)
    stream = recipe.stream(recipe.load())
    assert stream.batch_size == 18  # 6 training classes are all there are
    assert (np.bincount(stream.batch(0)["label"]) == 3).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative_margin": 0.95}, "negative margin must be below positive margin, got 0.95 and 0.9"),
        ({"positive_weight": -1.0}, "weights must not be negative"),
        ({"per_class": 1}, "--per-class must be at least 2, got 1: a batch without two examples"),
        ({"classes_per_batch": 1}, "--classes-per-batch must be at least 2, got 1"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"far_low": 0.2}, r"--far-low and --far-high must rise within \(0, 1\), got 0.2 and 0.1"),
        ({"class_rate": 0.0}, "--class-rate must be positive, got 0"),
        ({"data": Data("digits"), "train_classes": 9}, r"--train-classes must lie in 2..8: 'digits' has 10 classes"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Recipe(**settings).build()


def test_a_test_set_too_small_for_the_rates_says_how_many_pairs_it_needs():
    recipe = Recipe(far_low=1e-6, far_high=1e-1)
    with pytest.raises(UserError, match="at least 1000000 are needed"):
        recipe.measure(np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) // 4)


def test_unlabelled_images_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 3, 3), np.uint8))
    with pytest.raises(UserError, match="has no field 'label'; metric learning needs the class"):
        Recipe(data=Data(path=str(tmp_path / "x.npz"))).build()


def test_an_arm_without_training_and_an_unknown_one():
    found = recipe_module.arm("untrained encoder", 0)
    want = np.mean([np.log(found[f"{loss}_opis"]) for loss in recipe_module.CLAIM_LOSSES])
    assert found["log_opis"] == pytest.approx(want)
    with pytest.raises(UserError, match="unknown arm"):
        recipe_module.arm("tcm", 0)
