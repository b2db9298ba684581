"""ped's recipe: pools from files, models and the generator, what it prints and exports, and refused settings."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from checkpoints.model import load_model, save_model
from data.stream import DataError
from trainers import cli
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import UserError
from trainers.recipes.representation import ped as recipe
from trainers.recipes.representation.ped import PoolData
from trainers.run import train
from zoo.metrics import transferability as scores
from zoo.nn.mlp import MLP
from zoo.representation.ped import PotentialEnergyDescent

NAMES = ("red", "green", "blue", "grey")
FEW = ("logme", "gbc", "leep")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Four models of a target of three classes, the clearer the classes the better after fine-tuning."""
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat([0, 1, 2], [14, 10, 8]))
    kept = {}
    for name, clear, accuracy in zip(NAMES, (0.3, 0.9, 0.6, 0.1), (0.7, 0.9, 0.85, None), strict=True):
        x = rng.normal(size=(32, 6)) + clear * rng.normal(size=(3, 6))[y]
        fields = {"features": x, "labels": y, "general": 2 * rng.normal(size=(20, 6))}
        fields |= {"source_probabilities": rng.dirichlet(np.ones(4), 32)}
        np.savez(folder / f"{name}.npz", **fields, **({} if accuracy is None else {"accuracy": accuracy}))
        kept[name] = {**fields, "accuracy": accuracy}
    return folder, kept, y


def run(into, **change):
    made = recipe.Recipe(**{"metrics": FEW, **change})
    return train("ped", made, into, Settings(Parallel(devices=1)), progress=False)


def test_a_folder_of_features_is_ranked(pool, tmp_path):
    folder, kept, y = pool
    found = run(tmp_path, data=PoolData(features=str(folder)), dt=0.5)
    descent = PotentialEnergyDescent(0.5)
    moved = {n: descent(k["features"], y, k["general"]) for n, k in kept.items()}
    want = {n: scores.logme(moved[n], y) for n in NAMES}
    with (tmp_path / "ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["model"] for r in rows] == sorted(want, key=want.get, reverse=True)
    for r in rows:
        name = r["model"]
        np.testing.assert_allclose(float(r["logme_ped"]), want[name], rtol=1e-8)
        np.testing.assert_allclose(float(r["logme"]), scores.logme(kept[name]["features"], y), rtol=1e-8)
        np.testing.assert_allclose(float(r["gbc_ped"]), scores.gbc(moved[name], y), rtol=1e-8)
        np.testing.assert_allclose(float(r["leep"]), scores.leep(kept[name]["source_probabilities"], y), rtol=1e-5)
        assert r["accuracy"] == ("" if kept[name]["accuracy"] is None else str(kept[name]["accuracy"]))
        motion = descent.motion(kept[name]["features"], y, kept[name]["general"])[1]
        assert "leep_ped" not in r and int(r["steps"]) == motion.steps
        np.testing.assert_allclose([float(r["energy_before"]), float(r["energy_after"])], motion.energies[[0, -1]])
    assert np.any(moved["red"] != kept["red"]["features"])
    accuracies = [0.7, 0.9, 0.85]  # only the models whose accuracy is known
    tau = scipy.stats.weightedtau([want[n] for n in NAMES[:3]], accuracies)[0]
    np.testing.assert_allclose(found["metrics"]["rank/tau_logme_ped"], tau, rtol=1e-6)
    raw = scipy.stats.weightedtau([scores.logme(kept[n]["features"], y) for n in NAMES[:3]], accuracies)[0]
    np.testing.assert_allclose(found["metrics"]["rank/tau_logme"], raw, rtol=1e-6)
    assert "rank/tau_leep" in found["metrics"] and "rank/tau_leep_ped" not in found["metrics"]
    correlations = json.loads((tmp_path / "correlations.json").read_text())
    rho = scipy.stats.spearmanr([want[n] for n in NAMES[:3]], accuracies)[0]
    np.testing.assert_allclose(correlations["logme_ped"]["spearman"], rho)
    lines = found["summary"].splitlines()
    assert [line.split()[1] for line in lines[1:5]] == [r["model"] for r in rows]
    assert lines[5].split()[0] == "score" and [line.split()[0] for line in lines[6:]] == ["LogME", "GBC", "LEEP"]
    assert lines[8].split()[2] == "-"
    assert (tmp_path / "ranking.png").stat().st_size > 5000
    model = load_model(tmp_path / "model")
    assert model.definition == descent
    assert model.variables["ranking"]["scores"].shape == (2, 3, 4)
    assert model.info["preprocessing"]["ranking"] == [r["model"] for r in rows]


def test_without_accuracies_there_is_a_ranking_but_nothing_to_correlate(pool, tmp_path):
    _, kept, y = pool
    for name in ("b", "a"):
        np.savez(tmp_path / f"{name}.npz", features=kept["blue" if name == "b" else "grey"]["features"], labels=y)
    found = run(tmp_path / "run", data=PoolData(features=str(tmp_path)), rescale="self")
    assert "no accuracies are given" in found["summary"] and found["summary"].splitlines()[1].split()[1] == "b"
    assert not [k for k in found["metrics"] if "tau" in k]
    assert (tmp_path / "run" / "ranking.png").exists()
    assert "LEEP" not in found["summary"]


def test_exported_models_are_encoded_and_ranked(tmp_path):
    rng = np.random.default_rng(0)
    images = {"x": rng.uniform(-1, 1, (40, 4, 4, 1)), "label": np.arange(40) % 2}
    images["x"][:20, 0] += 0.3 * (np.arange(20) % 2)[:, None, None]
    images["x"] = np.clip(images["x"], -1, 1)
    np.savez(tmp_path / "images.npz", **images)
    np.savez(tmp_path / "general.npz", x=rng.uniform(-1, 1, (30, 4, 4, 1)))
    module = MLP((8,), 5)
    for i, name in enumerate(("one", "two")):
        variables = module.init(jax.random.key(i), jnp.zeros((1, 4, 4, 1)))
        save_model(tmp_path / "models" / name, module, variables, {}, {})
    (tmp_path / "models" / "accuracies.csv").write_text("model,accuracy\none,0.5\ntwo,0.75\n")
    data = PoolData(
        models=str(tmp_path / "models"), path=str(tmp_path / "images.npz"), general=str(tmp_path / "general.npz")
    )
    pool = recipe.Recipe(data=data)._pool()
    assert [(m.name, m.accuracy) for m in pool] == [("one", 0.5), ("two", 0.75)]
    x = recipe.image_dataset("", data.path)["train"]["x"]
    np.testing.assert_allclose(pool[1].features, module.apply(variables, jnp.asarray(x)), rtol=1e-4, atol=1e-5)
    assert pool[0].general.shape[1] == 5 and pool[0].general.shape[0] == 27
    np.testing.assert_allclose(
        recipe.features_of(tmp_path / "models" / "two", x, block=7), pool[1].features, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UserError, match=r"one: cannot encode images of shape \[3, 3, 1\] \("):
        recipe.features_of(tmp_path / "models" / "one", x[:, :3, :3])
    with pytest.raises(UserError, match="one has no general features, which the official method rescales by"):
        recipe.Recipe(data=PoolData(models=data.models, path=data.path))._pool()
    with pytest.raises(UserError, match="the images have no labels"):
        recipe.Recipe(data=PoolData(models=data.models, path=data.general))._pool()
    with pytest.raises(UserError, match=r"holds 0 exported model\(s\)"):
        recipe.Recipe(data=PoolData(models=str(tmp_path / "none"), path=data.path))._pool()


def test_outputs_that_are_features_and_others():
    rows = np.ones((2, 3))
    np.testing.assert_array_equal(recipe._features({"logits": rows, "pooled": 2 * rows}), 2 * rows)
    with pytest.raises(ValueError, match="outputs are logits; expected one of embedding"):
        recipe._features({"logits": rows})
    with pytest.raises(ValueError, match=r"shape \[2, 3, 1\]; expected features"):
        recipe._features(rows[..., None])


@pytest.mark.slow
def test_the_generated_pool_is_ranked_and_the_arms_are_what_it_says(tmp_path):
    found = run(tmp_path)
    assert found["metrics"]["pool/models"] == 10
    method, baseline = (recipe.arm(name, 0) for name in ("LogME + PED", "LogME"))
    np.testing.assert_allclose(found["metrics"]["rank/tau_logme_ped"], method["weighted_tau"], rtol=1e-6)
    np.testing.assert_allclose(found["metrics"]["rank/tau_logme"], baseline["weighted_tau"], rtol=1e-6)
    assert recipe.arm("random ranking", 0) != recipe.arm("random ranking", 1)


def test_unknown_arm():
    with pytest.raises(UserError, match="LogME"):
        recipe.arm("LogMe", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": 0.0}, "--dt must be positive, got 0.0"),
        ({"exit_ratio": 1.0}, "--exit-ratio must be in"),
        ({"max_steps": 0}, "--max-steps must be at least 1"),
        ({"nleep_ratio": 0}, "--nleep-ratio must be at least 1"),
        ({"metrics": ()}, "--metrics must name one score or more, each once; got none"),
        ({"metrics": ("gbc", "gbc")}, "each once; got gbc gbc"),
        ({"metrics": ("gbc",)}, "--metric logme is not among --metrics gbc"),
        ({"data": PoolData(features="a", models="b")}, "--data.features and --data.models are two pools"),
        ({"data": PoolData(general="a")}, "--data.general goes with --data.models"),
        ({"data": PoolData(path="a")}, "--data.path holds images for --data.models"),
        ({"data": PoolData(name="cifar10")}, "'cifar10' needs --data.models DIR"),
    ],
)
def test_bad_settings_are_one_clear_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        recipe.Recipe(**change).build()
    assert "\n" not in str(error.value)


def test_bad_pools_are_one_clear_line(pool, tmp_path):
    folder, kept, y = pool
    made = recipe.Recipe(data=PoolData(features=str(folder)), nleep_ratio=11)
    with pytest.raises(UserError, match="blue: nleep: 33 components .* lower --nleep-ratio .--metrics chooses"):
        made.scores(made._pool(), made.descent())
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", features=kept["red"]["features"], labels=y)
    bare = PoolData(features=str(tmp_path))
    with pytest.raises(UserError, match="a has no general features.*--rescale self to use the target's own"):
        recipe.Recipe(data=bare).build()
    with pytest.raises(UserError, match="--metric nce reads source probabilities, which some models do not have"):
        recipe.Recipe(data=bare, metric="nce", rescale="self").build()
    with pytest.raises(DataError, match="there is no such folder"):
        recipe.Recipe(data=PoolData(features=str(tmp_path / "no"))).build()


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "ped", "--workdir", str(tmp_path / "w"), "--data.features", str(tmp_path)])
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "holds 0 model(s)" in said
    assert not (tmp_path / "w").exists()


def test_pairwise_baseline_is_the_step():
    rng = np.random.default_rng(0)
    means, radii = rng.normal(size=(5, 3)).astype(np.float32), rng.uniform(1, 2, 5).astype(np.float32)
    got = recipe.ped.potential_energy_step(jnp.asarray(means), jnp.asarray(radii))
    np.testing.assert_allclose(recipe.pairwise_step(means, radii), got, atol=1e-6)
