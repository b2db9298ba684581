"""The supremix recipe: both runs start alike, what it measures, its picture, and errors a user can mend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.stream import DataError
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel
from trainers.probes import ridge_probe
from trainers.recipe import Data, UserError
from trainers.recipes.representation import supremix as recipe_module
from trainers.recipes.representation.supremix import Recipe, components, first_component_order
from trainers.record import Record
from zoo.base import Context, check_fit


@pytest.fixture(scope="module")
def ran():
    recipe = Recipe(steps=4, batch_size=16, hidden=8, features=4, imbalance=True, noise=0.0)
    run = recipe.build()
    record = Record()
    result = Loop(run, Settings(Parallel(devices=1), 1, 1, 10), record=record)()
    return recipe, run, result, record


def test_both_runs_start_alike(ran):
    _, run, result, record = ran
    assert [p.name for p in run.phases] == ["supcon_training", "supcon", "supremix_training", "supremix"]
    first = {}
    for line in record.history:
        first.setdefault(line["phase"], line)
    assert first["supcon_training"]["loss"] == pytest.approx(first["supremix_training"]["loss_before"], rel=1e-5)
    assert first["supremix_training"]["loss"] > first["supremix_training"]["loss_before"]  # more candidates
    a, b = (np.asarray(result.artefacts[n]["embedding"]) for n in ("supcon", "supremix"))
    assert a.shape == b.shape and a.shape[1] == 4 and not np.allclose(a, b)
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), 1, rtol=1e-4)


def test_what_is_measured_drawn_and_exported(ran, tmp_path):
    recipe, run, result, _ = ran
    data = recipe.load()
    z = np.asarray(result.artefacts["supremix"]["embedding"])
    found = recipe.measure(z, data)
    cut = len(data["train"]["x"])
    predicted = ridge_probe(z[:cut], data["train"]["target"], z[cut:], recipe.penalty)
    error = np.abs(predicted - data["test"]["target"])
    assert found["mae"] == pytest.approx(error.mean(), rel=1e-4)
    counts = np.bincount(data["train"]["label"].astype(int))
    rare = counts[data["test"]["label"].astype(int)] < 20
    assert found["few_mae"] == pytest.approx(error[rare].mean(), rel=1e-4)
    assert {"many_mae", "median_mae", "few_gmean", "pearson", "spearman", "pc1_spearman"} <= set(found)
    run.figures(result, tmp_path)
    assert (tmp_path / "embeddings.png").stat().st_size > 10_000
    text = run.summary({f"{n}/{k}": v for n in ("supcon", "supremix") for k, v in found.items()})
    assert text.startswith("probe MAE on manifold: supcon ") and "supremix" in text
    export = run.export(result.variables, {})
    assert export.definition.apply(export.variables, jnp.ones((2, 28))).shape == (2, 4)


def test_principal_components_by_hand():
    target = np.arange(20.0, dtype=np.float32)
    z = np.stack([0.1 * np.sin(target * 9), -3 * target + 5], 1)
    assert first_component_order(z, target) == pytest.approx(1.0)
    assert abs(np.corrcoef(components(z)[:, 0], target)[0, 1]) == pytest.approx(1.0, abs=1e-3)
    assert first_component_order(np.ones((20, 3)), target) == 0


@pytest.mark.parametrize("name", ["supremix", "mix_neg", "mix_pos", "supcon", "rank_n_contrast", "supcr", "l1"])
def test_every_method_has_its_host(name):
    recipe = Recipe(method=name, hidden=4, features=4)
    data = recipe.load()
    host, transform = recipe.objective(name, data), recipe.transformation(name)
    assert (transform is not None) == (name in recipe_module.MIXED)
    if transform is not None:
        check_fit(transform, host)
    batch = jax.tree.map(jnp.asarray, recipe.stream(data).batch(0))
    variables = host.init(jax.random.key(0), batch)
    loss = host.loss(*(host.forward(variables, batch, Context(jax.random.key(0)))[0], batch), Context(None))
    assert np.isfinite(np.asarray(loss.elements.values)).all()
    z = recipe.embed(name)(variables, batch, Context(None, train=False))
    np.testing.assert_allclose(  # without noise
        z, recipe.embed(name)(variables, batch, Context(jax.random.key(1))), rtol=1e-6
    )
    assert len(recipe.build().phases) == (2 if name == "supcon" else 4)


def test_halves_are_the_halves(monkeypatch):
    seen = {}
    monkeypatch.setattr(recipe_module, "supremix", lambda *args, **kwargs: seen.update(args=args, **kwargs))
    for name, flags in {"supremix": (True, True), "mix_neg": (True, False), "mix_pos": (False, True)}.items():
        Recipe(pool=4, beta="even", weight="l2", chunk=7, variant="official").transformation(name)
        assert seen["args"] == (0.3, 5.0, (5.0, 5.0), "l2", *flags, 4)
        assert (seen["chunk"], seen["variant"]) == (7, "official")


def test_real_data_by_name_and_path(tmp_path):
    data = Recipe(data=Data("diabetes")).load()
    assert data.info["bin_size"] == 10.0 and data["train"]["label"].max() < 40
    rows = "".join(f"{i},{i * i},{i % 4},{'test' if i > 20 else 'train'}\n" for i in range(30))
    (tmp_path / "own.csv").write_text("a,b,label,split\n" + rows)
    own = Recipe(data=Data(path=str(tmp_path / "own.csv")), steps=1, batch_size=8)
    assert own.load()["train"]["x"].shape == (21, 2) and own.build()
    one = Recipe(data=Data(path=str(tmp_path / "own.csv")), views=1)
    assert "views" not in one.objective("supcon", one.load()).provides


def test_labels_without_ties(tmp_path):
    rows = "".join(f"{i},{i + 0.5},{'test' if i > 20 else 'train'}\n" for i in range(30))
    (tmp_path / "own.csv").write_text("a,label,split\n" + rows)
    path = Data(path=str(tmp_path / "own.csv"))
    with pytest.warns(UserWarning, match="consider bins of size"):
        Recipe(data=path).load()
    with pytest.raises(DataError, match="have one view, so they have no positive"):
        Recipe(data=path, views=1).load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "--temperature, --window and --chunk: temperature must be positive, got 0.0"),
        ({"window": -1.0}, "window must be positive"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"pool": 3}, "--pool 3 must divide --batch-size 64"),
        ({"views": 3}, "--views must be 1 or 2, got 3"),
        ({"views": 1, "method": "supcr"}, "--views 1 goes with supremix"),
        ({"noise": -1.0}, "--noise must not be negative, got -1"),
        ({"bin_size": -1.0}, "--bin-size must not be negative, got -1"),
        ({"many": 5}, "--many must be at least --few, got 5 and 20"),
        ({"data": Data("diabetis")}, "unknown --data.name 'diabetis'; did you mean 'diabetes'.*--data.path FILE.csv"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Recipe(**settings).build()


def test_an_arm_without_training_and_an_unknown_one():
    found = recipe_module.arm("untrained encoder", 0)
    assert found["log_mae"] == pytest.approx(np.log(found["mae"])) and 0 <= found["pc1_spearman"] <= 1
    with pytest.raises(UserError, match="unknown arm"):
        recipe_module.arm("supremix", 0)
