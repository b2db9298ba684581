"""The dynamic_subspace recipe: splits and clusters between epochs, one compilation, exact resumption, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.store import Store
from data import factors
from trainers import segmentation
from trainers.errors import Interrupted
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, Optimizer, UserError
from trainers.recipes.representation import dynamic_subspace as recipe_module
from trainers.recipes.representation.dynamic_subspace import Recipe
from trainers.state import begin_phase
from trainers.subspaces import activation_mapper
from trainers.trees import flatten, to_host
from zoo.base import Context
from zoo.losses.segmentation import dice_ce
from zoo.nn.unet import UNet
from zoo.ops.segmentation import proxy_mask
from zoo.representation import dynamic_subspace as ds

TINY = {
    "features": 16, "epochs": 6, "finetune_epoch": 5, "batches": 2, "per_class": 2, "patience": 1, "threshold": 0.05,
    "min_size": 2, "min_pool": 4, "restarts": 1, "cluster_iterations": 4, "optimizer": Optimizer(learning_rate=1e-7),
    "segment_steps": 3, "segment_widths": (2, 3),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_data():
    """A few small images instead of the default ones."""
    patch = pytest.MonkeyPatch()
    tiny = lambda seed: factors.factor_images(  # noqa: E731
        seed, 2, 2, 1, train=48, validation=16, test=16, size=16
    )
    patch.setattr(recipe_module, "factor_images", tiny)
    yield
    patch.undo()


def loop_of(recipe, **rest):
    return Loop(recipe.build(), Settings(Parallel(devices=1), 1, 1, 1), seed=recipe.seed, **rest)


@pytest.fixture(scope="module")
def ran():
    recipe = Recipe(**TINY)
    loop = loop_of(recipe)
    made, compile_step = [], loop.place.compile
    loop.place.compile = lambda *args: made.append(1) or compile_step(*args)
    return recipe, loop.run, loop(), made


def test_splits_and_clusters_come_between_epochs_that_share_one_compiled_step(ran):
    _, run, result, made = ran
    names = [p.name for p in run.phases]
    assert names[:3] == ["clusters", "epoch0", "after0"] and names[-5:-3] == ["after5", "test"]
    assert names[-3:] == ["proxies", "segment", "segmentation"]
    assert len(made) == 2  # one for all epochs, one for the U-Net
    history, state = result.artefacts["history"], result.variables["subspace"]
    assert history.shape == (6, 4) and np.isfinite(history).all()
    learners = int(state["learners"])
    assert learners == 1 + int(history[:, 3].sum()) == int(history[-1, 2]) > 1
    assert int(np.asarray(state["owner"]).max()) == learners - 1 and int(state["epoch"]) == 6
    # clusters are found anew at even epochs, by as many learners as there were
    clusters = result.artefacts["clusters"]
    assert clusters.shape == (48,) and 1 < int(result.artefacts["learners"]) <= learners
    assert clusters.max() < result.artefacts["learners"]
    assert result.metrics["test/learners"] == learners and 0 <= result.metrics["test/proxy_dice"] <= 1


def test_what_it_draws_says_and_exports(ran, tmp_path):
    recipe, run, result, _ = ran
    run.figures(result, tmp_path)
    assert all((tmp_path / f).stat().st_size > 5_000 for f in ("learners.png", "attention.png"))
    text = run.summary(result.metrics)
    assert "learners: test NMI" in text and text.count("Dice of attention masks") == 1 and "of a U-Net taught" in text
    assert "one class only" in run.summary({**result.metrics, "test/batches_without_negatives": 3.0})
    export = run.export(result.variables, {})
    x = recipe.load()["test"]["x"]
    z = export.definition.apply(export.variables, jnp.asarray(x))
    np.testing.assert_allclose(z, recipe.embedder()(result.variables, x)["embedding"], atol=1e-5)


def test_a_run_that_was_cut_after_a_split_ends_with_the_same_bits(ran, tmp_path):
    recipe, _, alone, _ = ran
    first = int(np.flatnonzero(alone.artefacts["history"][:, 3])[0])
    loop = loop_of(recipe, store=Store(tmp_path / "checkpoints"), folder=tmp_path)
    save, at = loop._save, [p.name for p in loop.run.phases].index(f"epoch{first + 1}")

    def stop(state, phase, step):
        save(state, phase, step)
        if (phase, step) == (at, 1):
            raise Interrupted("stopped")

    loop._save = stop
    with pytest.raises(Interrupted):
        loop()
    again = loop_of(recipe, store=Store(tmp_path / "checkpoints"), folder=tmp_path)()
    want, got = flatten(to_host(alone.state)), flatten(to_host(again.state))
    assert want.keys() == got.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)
    for name, value in alone.artefacts.items():
        np.testing.assert_array_equal(again.artefacts[name], value)


def split_event(recipe):
    data, host = recipe.load(), recipe.objective()
    batch = jax.tree.map(jnp.asarray, recipe.stream(data, 0).batch(0))
    variables = host.init(jax.random.key(0), batch)
    state = {
        **variables["subspace"], "epoch": jnp.int32(3), "best": jnp.float32(2.0), "best_epoch": jnp.int32(1),
        "importance": jnp.linspace(0, 1, 16), "count": jnp.float32(4),
    }  # fmt: skip
    variables = {**variables, "subspace": state}
    tx = recipe.optimizer.build(10)
    moments = jax.tree.map(jnp.ones_like, tx.init(variables["params"]))
    past = {"history": np.full((6, 4), np.nan, np.float32), "clusters": np.zeros(48, np.int32), "learners": np.int32(1)}
    return recipe.event(data, 3, variables, past, jax.random.key(1), recipe.embedder()), moments, variables


def test_a_split_edits_the_optimiser_unless_told_not_to():
    found, moments, variables = split_event(Recipe(**TINY))
    assert found.metrics["split"] == 1 and found.metrics["learners"] == 2
    reset = np.asarray(found.variables["subspace"]["owner"]) == 1
    mu = flatten(found.edit(moments))
    touched = [p for p in mu if "embedding" in p and ("/mu/" in p or "/nu/" in p)]
    assert len(touched) == 4
    for path in touched:
        assert (np.asarray(mu[path])[..., reset] == 0).all() and (np.asarray(mu[path])[..., ~reset] == 1).all()
    others = [p for p in mu if "trunk" in p]
    assert others and all((np.asarray(mu[p]) == 1).all() for p in others)
    assert found.variables["params"]["trunk"] is variables["params"]["trunk"]
    assert found.artefacts["learners"] == 2 and set(np.unique(found.artefacts["clusters"])) <= {-1, 0, 1}
    assert (found.artefacts["history"][3] == [*found.artefacts["history"][3][:2], 2, 1]).all()
    assert split_event(Recipe(**TINY, keep_moments=True))[0].edit is None
    single = split_event(Recipe(**TINY, learners="single"))[0]
    assert single.metrics["split"] == 0 and set(single.artefacts) == {"history"}


def test_fixed_learners_start_with_their_clusters_and_the_classifier_runs(tmp_path):
    recipe = Recipe(**{**TINY, "epochs": 1, "segment_steps": 0}, learners="fixed", fixed_learners=3)
    result = loop_of(recipe)()
    assert int(result.artefacts["learners"]) == 3 and result.artefacts["clusters"].max() == 2
    assert np.bincount(result.variables["subspace"]["owner"]).tolist() == [6, 6, 4]
    recipe = Recipe(**{**TINY, "epochs": 1}, learners="classifier")
    run = recipe.build()
    result = Loop(run, Settings(Parallel(devices=1), 1, 1, 10))()
    assert "classifier: test NMI" in run.summary(result.metrics)
    export = run.export(result.variables, {})
    x = jnp.asarray(recipe.load()["test"]["x"])
    pooled = export.definition.apply(export.variables, x)
    assert pooled.shape == (16, 64) and set(export.variables) == {"params"}
    # class activation maps of the predicted class average to its logit, and make the proxy masks
    maps = activation_mapper(recipe.module(only="features"), 12)(result.variables, np.asarray(x))
    logits = pooled @ result.variables["params"]["head"].T
    np.testing.assert_allclose(maps.mean((1, 2, 3)), np.max(logits, 1), atol=1e-5)
    assert result.metrics["test/cam_dice"] == result.metrics["segmentation/proxy_dice"]
    assert "Dice of class activation masks" in run.summary(result.metrics)
    run.figures(result, tmp_path)
    assert (tmp_path / "attention.png").stat().st_size > 5_000


def test_phases_of_a_series_draw_their_own_numbers(ran):
    _, run, _, _ = ran
    a, b = (p for p in run.phases if p.name in ("epoch0", "epoch1"))
    seeds = [int(begin_phase({"params": {}}, dataclasses.replace(p, updates={}), 7).seed) for p in (a, b)]
    assert seeds[0] != seeds[1]
    assert int(begin_phase({"params": {}}, dataclasses.replace(a, updates={}, series=None), 7).seed) == 7


def test_without_attention_and_with_resnet_50():
    recipe = Recipe(attention=False)
    assert not recipe.module().attention
    # no maps, no segmentation, unless it is asked for
    assert [p.name for p in recipe.build().phases][-2:] == ["after25", "test"]
    assert [p.steps for p in Recipe().build().phases if p.name == "segment"] == [160]
    assert Recipe(attention=False, learners="classifier").build().phases[-1].name == "segmentation"
    shapes = jax.eval_shape(
        lambda: Recipe(backbone="resnet50").module().init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    )
    assert shapes["params"]["embedding"]["kernel"].shape == (1024, 32)
    assert shapes["params"]["attention"]["conv1"]["kernel"].shape == (3, 3, 1024, 128)
    assert shapes["params"]["attention"]["conv2"]["kernel"].shape == (3, 3, 128, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_class": 1}, "--per-class must be at least 2, got 1: an anchor needs a positive"),
        ({"classes_per_batch": 1}, "--classes-per-batch must be at least 2, got 1"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"threshold": 1.0}, r"--threshold must lie within \(0, 1\), got 1.0"),
        ({"segment_steps": -1}, "--segment-steps must be at least 0, got -1"),
        ({"segment_steps": 5, "attention": False}, "--segment-steps 5 with --no-attention: there are no maps"),
        ({"segment_widths": (4, 0)}, "--segment-widths: expected one or more widths"),
        ({"cutoff": 2.0}, "--alpha, --beta and --cutoff"),
        ({"learners": "fixed", "fixed_learners": 40}, "--fixed-learners 40: 32 neurons cannot make 40 slices"),
        ({"data": Data("factor")}, "unknown data 'factor'; did you mean 'factors'"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Recipe(**settings).build()


def test_a_class_with_a_single_image_is_refused(monkeypatch):
    data = Recipe().load()
    alone = {k: v[(data["train"]["label"] != 1) | (np.arange(48) == np.argmax(data["train"]["label"] == 1))]
             for k, v in data["train"].items()}  # fmt: skip
    monkeypatch.setattr(Recipe, "load", lambda self: dataclasses.replace(data, splits={**data.splits, "train": alone}))
    with pytest.raises(UserError, match="class 1 has a single training image"):
        Recipe().build()


def test_an_unknown_arm():
    with pytest.raises(UserError, match="unknown arm"):
        recipe_module.arm("dynamic", 0)


def test_the_importance_decides_which_neurons_stay():
    found, _, variables = split_event(Recipe(**{**TINY, "threshold": 0.5}))
    order = np.argsort(-np.asarray(ds.importance_scores(variables["subspace"])))[:8]
    kernel = np.asarray(variables["params"]["embedding"]["kernel"])
    np.testing.assert_array_equal(np.asarray(found.variables["params"]["embedding"]["kernel"])[:, :8], kernel[:, order])


def test_the_claim_keeps_the_schedule_it_was_run_with(monkeypatch):
    seen = []

    def train(recipe, data, epochs):
        seen.append((recipe, epochs))
        raise Interrupted("enough")

    monkeypatch.setattr(recipe_module, "_train", train)
    for name in ("single learner", "untrained encoder", "fixed 4"):
        with pytest.raises(Interrupted):
            recipe_module.arm(name, 3)
    assert [e for _, e in seen] == [16, 0, 16]
    for recipe, _ in seen:
        assert (recipe.seed, recipe.finetune_epoch, recipe.batches, recipe.patience) == (3, 14, 36, 2)
    assert [r.learners for r, _ in seen] == ["single", "single", "fixed"] and seen[2][0].fixed_learners == 4


def test_the_unet_learns_proxy_masks_and_gives_the_encoder_back(ran):
    recipe, run, result, _ = ran
    data, embed, variables = recipe.load(), recipe.embedder(), result.variables
    train, test = data["train"], data["test"]
    assert set(variables["params"]) == {"trunk", "attention", "embedding"}
    proxies = proxy_mask(jnp.asarray(embed(variables, train["x"])["map"]), (16, 16))
    np.testing.assert_array_equal(result.artefacts["proxies"], proxies)
    predicted = segmentation.predicted_masks(recipe._unet(), variables["aside"], test["x"])
    logits = recipe._unet().apply({"params": variables["aside"]}, jnp.asarray(test["x"]))[..., 0]
    np.testing.assert_array_equal(predicted, np.asarray(jax.nn.sigmoid(logits)) > 0.5)
    both = 2 * (predicted & test["mask"]).sum((1, 2)) / (predicted.sum((1, 2)) + test["mask"].sum((1, 2)))
    metrics = result.metrics
    assert metrics["segmentation/dice"] == pytest.approx(both.mean(), abs=1e-6)
    assert metrics["segmentation/proxy_dice"] == pytest.approx(metrics["test/proxy_dice"], abs=1e-6)
    assert metrics["segmentation/foreground"] == pytest.approx(predicted.mean(), abs=1e-6)
    assert not {"aside", "subspace"} & set(run.export(variables, {}).variables)


def test_the_unet_minimises_its_loss_against_the_proxies_of_its_own_images():
    host = segmentation.mask_objective(UNet(1, (2, 3), norm="instance"))
    rng = np.random.default_rng(0)
    proxies = jnp.asarray(rng.random((5, 8, 8)) < 0.3)
    batch = {"x": jnp.asarray(rng.normal(size=(3, 8, 8, 3)), jnp.float32), "index": jnp.asarray([4, 0, 9]),
             "mask": jnp.asarray([True, True, False])}  # fmt: skip
    variables = host.init(jax.random.key(0), batch)
    context = Context(jax.random.key(0), artefacts={"proxies": proxies})
    outputs, changed = host.forward({**variables, "subspace": {"owner": jnp.zeros(2)}}, batch, context)
    assert changed == {}
    found = host.loss(outputs, batch, context).elements
    want = dice_ce(outputs["logits"][:2], proxies[jnp.asarray([4, 0])])
    np.testing.assert_allclose(found.values, [*want, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="needs parameters only, got batch_stats, params"):
        segmentation.mask_objective(UNet(1, (2,), norm="batch")).init(jax.random.key(0), batch)


def test_data_without_masks_train_and_report_no_dice(monkeypatch):
    whole = Recipe().load()
    bare = {s: {k: v for k, v in rows.items() if k != "mask"} for s, rows in whole.splits.items()}
    monkeypatch.setattr(Recipe, "load", lambda self: dataclasses.replace(whole, splits=bare))
    run = Recipe(**{**TINY, "epochs": 1}, learners="classifier").build()
    metrics = Loop(run, Settings(Parallel(devices=1), 1, 1, 10))().metrics
    assert {k for k in metrics if k.startswith("segmentation/")} == {"segmentation/foreground"}
    assert "test/cam_dice" not in metrics and "no Dice: the test images have no masks" in run.summary(metrics)
