"""stationary's recipe: its run and what it leaves, models given from elsewhere, its arms, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.model import load_model, save_model
from data.dataset import Dataset
from data.images import digits
from data.open_set import open_set
from data.stream import DataError
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.phases import Alternate
from trainers.protocols import compatibility_of
from trainers.recipe import Data, Optimizer, UserError
from trainers.recipes.representation import stationary as recipe
from trainers.run import train, train_in_memory
from trainers.trees import flatten
from zoo.nn.mlp import MLP
from zoo.ops.lineage import check_comparable, lineage, lineage_of_text
from zoo.ops.simplex import simplex_prototypes
from zoo.representation import stationary as method

TINY = {
    "epochs": 1,
    "server_epochs": 2,
    "preallocated": 16,
    "batch_size": 32,
    "per_class": 40,
    "encoders": ("mlp", "deep"),
}
QUICK = Settings(Parallel(devices=1), 1, save_every=10**6)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole run on the digits, of the method alone."""
    work, made = tmp_path_factory.mktemp("run"), recipe.Recipe(**TINY, initial=3, baselines=False)
    return made, train("stationary", made, work, QUICK, progress=False), work


def test_a_run_measures_and_draws_its_sequence(done):
    _, found, work = done
    for name in ("average_compatibility", "average_accuracy", "self_accuracy", "cross_accuracy"):
        assert 0 <= found["metrics"][f"hoc_compatibility/{name}"] <= 1
    assert [found["metrics"][f"hoc{t}_gallery/incomparable"] for t in range(2)] == [0, 0]
    assert [found["metrics"][f"server{t}_simplex_keep/classes"] for t in range(2)] == [3, 5]
    assert found["summary"].startswith("simplex and HOC: AC ") and "dead" not in found["summary"]
    assert (work / "compatibility.png").stat().st_size > 5000


def test_the_baselines_come_first_with_servers_of_their_own_kind():
    run = recipe.Recipe(**TINY, initial=3).build()
    names = [p.name for p in run.phases if isinstance(p, Alternate)]
    servers = ["server0_linear", "server1_linear", "server0_simplex", "server1_simplex"]
    assert names == [*servers, "er0", "er1", "ce0", "ce1", "hoc0", "hoc1"]
    assert run.phases[-1].name == "local_classes"
    metrics = {f"{a}_compatibility/average_{k}": v for a in ("er", "ce", "hoc") for k, v in
               (("compatibility", 0.5), ("accuracy", 0.25))}  # fmt: skip
    assert run.summary(metrics) == (
        "simplex and HOC: AC 0.50, AA 25.0; simplex, cross-entropy alone: AC 0.50, AA 25.0; "
        "learned classifier (ER): AC 0.50, AA 25.0"
    )
    dead = run.summary({**metrics, "hoc0_gallery/zero_features": 3})
    assert dead.endswith("; 3 features have no length, the network may be dead")


def test_replay_alone_is_measured_though_nothing_is_comparable():
    made = recipe.Recipe(**TINY, initial=3, replacements=(0,), method="er", baselines=False)
    metrics = train_in_memory(made.build(), 1).metrics
    assert [metrics[f"er{t}_gallery/incomparable"] for t in range(2)] == [0, 1]


def test_the_model_searches_the_galleries_as_the_run_said(done):
    _, found, work = done
    model = load_model(work / "model")
    assert set(model.variables["constants"]) == {"classifier", "lineage"}
    assert isinstance(model.definition, method.StationaryNetwork) and model.definition.encoder == MLP((128, 128), 64)
    queries, _, identities = open_set(digits(), 1, True)
    z = model.definition.apply(dict(model.variables), jnp.asarray(queries["x"]), classify=False)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    with np.load(work / "artefacts" / "hoc0_gallery" / "gallery_hoc0.npz") as stored:
        kept = {k.lstrip("/"): stored[k] for k in stored.files}
    g = kept["features"] / np.linalg.norm(kept["features"], axis=1, keepdims=True)
    templates = np.stack([g[kept["label"] == i].mean(0) for i in range(identities)])
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    top = np.mean(np.argmax(z @ templates.T, 1) == queries["label"])
    assert top == pytest.approx(found["metrics"]["hoc1_gallery/against_hoc0"], abs=2e-3)
    own = lineage_of_text(model.info["preprocessing"]["lineage"])
    for k, v in own.items():
        np.testing.assert_array_equal(v, model.variables["constants"]["lineage"][k])
    check_comparable(own, lineage(simplex_prototypes(16), {}))
    assert np.asarray(own["parents"]).any(1).sum() == 1  # the server's model that was put in


def test_the_figures_are_those_of_the_matrix(done):
    _, found, work = done
    rows = {}
    for t in range(2):
        with np.load(work / "artefacts" / f"hoc{t}_gallery" / f"gallery_hoc{t}.npz") as stored:
            rows[f"gallery_hoc{t}"] = {"row": stored["/row"]}
    matrix = compatibility_of(rows, ["hoc0", "hoc1"])
    assert found["metrics"]["hoc_compatibility/average_compatibility"] == float(matrix[1, 0] > matrix[0, 0])
    assert found["metrics"]["hoc_compatibility/cross_accuracy"] == pytest.approx(matrix[1, 0])


def updates_of(made, arm, artefacts=None):
    data, local = digits(), 4
    found = made._updates(data, arm, local, [])
    shape = jnp.asarray(data["train"]["x"][:1])
    for kind in ("linear", "simplex"):
        for number in range(2):
            network = method.StationaryNetwork(made._encoder(number), made.preallocated, kind)
            own = network.init(jax.random.key(number + 5), shape)
            artefacts[f"server{number}_{kind}"] = {
                "params": own["params"],
                "lineage": lineage(method.frame(own), own["params"]),
            }
    return found


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_where_each_model_starts():
    made, artefacts = recipe.Recipe(**{**TINY, "encoders": ("mlp",)}), {}
    updates = updates_of(made, "hoc", artefacts)
    key = jax.random.key(0)
    first = updates[0].start({}, artefacts, key)
    server = dict(artefacts["server0_simplex"]["params"])
    assert same(first["params"], server) and same(first["constants"]["old"]["params"], server)
    assert set(first["constants"]) == {"classifier", "old", "lineage"}
    moved = {**first, "params": jax.tree.map(lambda x: x + 1, first["params"])}
    replaced = updates[1].start(moved, artefacts, key)  # task 1 is a replacement: the model before does not matter
    assert same(replaced["params"], artefacts["server1_simplex"]["params"])
    assert same(replaced["constants"]["lineage"], artefacts["server1_simplex"]["lineage"])
    went_on = updates[2].start(moved, artefacts, key)
    assert same(went_on["params"], moved["params"]) and same(went_on["constants"]["old"]["params"], moved["params"])
    plain = updates_of(made, "ce", artefacts)[1].start(moved, artefacts, key)
    assert set(plain["constants"]) == {"classifier", "lineage"}


def test_a_learned_classifier_grows_and_is_dropped_with_its_model():
    made, artefacts = recipe.Recipe(**{**TINY, "encoders": ("mlp",)}), {}
    updates = updates_of(made, "er", artefacts)
    key = jax.random.key(0)
    first = updates[0].start({}, artefacts, key)
    assert not same(first["params"]["classifier"], artefacts["server0_linear"]["params"]["classifier"])
    seen = [np.flatnonzero(np.asarray(u.start(first, artefacts, key)["constants"]["seen"])).tolist() for u in updates]
    assert seen == [[14, 15], [13, 14, 15], [12, 13, 14, 15]]  # from the end downward
    trained = {**first, "params": jax.tree.map(lambda x: x + 1, first["params"])}
    replaced, went_on = (updates[t].start(trained, artefacts, key)["params"]["classifier"] for t in (1, 2))
    assert same(went_on, trained["params"]["classifier"]) and not same(replaced, trained["params"]["classifier"])
    assert not updates[0].aligned


def test_batches_mix_memory_and_new_classes():
    made, artefacts = recipe.Recipe(**TINY), {}
    updates = updates_of(made, "ce", artefacts)
    assert set(updates[0].stream.batch(0)["label"]) == {0, 1}
    batch = updates[2].stream.batch(1)
    assert (batch["label"][:16] < 3).all() and (batch["label"][16:] == 3).all()
    old = {int(i) for p in range(9) for i in updates[2].stream.batch(p)["index"][:16]}
    assert len(old) <= 3 * 20  # 20 exemplars a class
    new = {int(i) for p in range(40) for i in updates[2].stream.batch(p)["index"][16:]}
    assert len(new) == 40  # --per-class


def test_weight_decay_spares_biases():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = recipe._optimizer(Optimizer("momentum", 1.0, weight_decay=0.5), 10)
    step, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(step["kernel"], -0.5)
    np.testing.assert_allclose(step["bias"], 0)


def test_models_from_elsewhere(tmp_path, done):
    _, _, work = done
    options = {**TINY, "models": (str(work), str(work / "model")), "baselines": False, "way": 2, "method": "ce"}
    metrics = train_in_memory(recipe.Recipe(**{**options, "initial": 2}).build()).metrics
    assert not any(k.startswith("server") for k in metrics) and metrics["ce1_gallery/incomparable"] == 0

    def refused(network, words, constants=None, preallocated=16):
        variables = network.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
        variables = {**variables, "constants": {**variables["constants"], **(constants or {})}}
        save_model(tmp_path / "m", network, variables, {}, {})
        with pytest.raises(UserError, match=words):
            recipe.Recipe(**{**options, "models": (str(tmp_path / "m"),) * 2, "preallocated": preallocated}).build()

    known = {"lineage": lineage(simplex_prototypes(16), {})}
    refused(method.StationaryNetwork(MLP((4,), 4), 512), "feature size 511 differs from simplex dimension 15", known)
    refused(method.StationaryNetwork(MLP((4,), 4), 16, "linear"), "trained with a linear classifier", known)
    refused(method.StationaryNetwork(MLP((4,), 4), 16), "has no lineage")
    other = {"lineage": lineage(jnp.ones((16, 15)), {"w": jnp.ones(2)})}
    refused(method.StationaryNetwork(MLP((4,), 4), 16), "--models .*cannot be compared", other)
    save_model(tmp_path / "mlp", MLP((4,), 4), MLP((4,), 4).init(jax.random.key(0), jnp.ones((1, 3))), {}, {})
    with pytest.raises(UserError, match="is a MLP; a model exported by zoo train stationary is needed"):
        recipe.Recipe(**{**options, "models": (str(tmp_path / "mlp"),) * 2}).build()
    with pytest.raises(UserError, match="--models nowhere"):
        recipe.Recipe(**{**options, "models": ("nowhere",) * 2}).build()


def test_a_first_model_without_a_server(tmp_path):
    options = {**TINY, "server": 0, "replacements": (0,), "initial": 8, "side": "start", "baselines": False}
    work, made = tmp_path / "run", recipe.Recipe(**{**options, "epochs": 4})
    found = train("stationary", made, work, QUICK, progress=False)
    assert found["metrics"]["local_classes/accuracy"] > 0.3
    model = load_model(work / "model")
    logits, _ = model.definition.apply(dict(model.variables), jnp.asarray(digits()["test"]["x"]))
    assert (np.argmax(logits, 1) < 9).mean() > 0.9  # placed from the start


def test_arms(monkeypatch):
    monkeypatch.setattr(recipe, "Recipe", functools.partial(recipe.Recipe, **TINY, initial=3))
    found, other = recipe.arm("untrained", 0), recipe.arm("simplex", 0)
    assert set(found) == set(other) and 0 < found["self_accuracy"] < 1 and found["cross_accuracy"] < 0.3
    assert recipe.arm("untrained", 1) != found
    with pytest.raises(UserError, match="unknown arm 'x'"):
        recipe.arm("x", 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"preallocated": 8},
            "--preallocated 8: needs 9 classes but the fixed simplex has K_pre=8; choose preallocated",
        ),
        ({"preallocated": 1}, "--preallocated must be at least 2, got 1"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"memory": 0}, "--memory must be at least 1, got 0"),
        ({"mu": -1.0}, "--mu must not be negative"),
        ({"lam": 1.5}, r"--lam must lie in \[0, 1\], got 1.5"),
        ({"server": 8}, "--server 8 and --held-out 1 leave 1 of 10 classes for --initial 2"),
        ({"way": 3}, "2 classes after the first task do not divide into tasks of --way 3"),
        ({"batch_size": 33}, "--batch-size 33 must be even"),
        ({"replacements": (1,)}, "--replacements 1 must ascend from 0"),
        ({"replacements": ()}, "--replacements  must ascend from 0"),
        ({"replacements": (0, 3)}, "stay below the 3 tasks"),
        ({"replacements": (0, 1, 1)}, "must ascend"),
        ({"encoders": ("mlp", "vit")}, "--encoders mlp vit: choose from mlp, wide"),
        ({"models": ("a",)}, "--models names 1 models for 2 --replacements"),
        ({"server": 0, "initial": 7}, "--server 0 leaves nothing to replace models with"),
        ({"server": 1, "initial": 6}, "--server 1 classes are too few for 2 replacements"),
        ({"optimizer": Optimizer(learning_rate=0.0)}, "--optimizer.learning-rate must be positive"),
    ],
)
def test_settings_that_cannot_work(options, words):
    with pytest.raises(UserError, match=words):
        recipe.Recipe(**{**TINY, **options}).build()


def test_data_that_cannot_work(tmp_path):
    with pytest.raises(
        UserError, match="--held-out 0 with --no-turned: 0 held-out classes without turned copies are 0 iden"
    ):
        recipe.Recipe(**TINY, held_out=0, turned=False, way=3).build()
    with pytest.raises(UserError, match="has no field 'label'"):
        recipe.Recipe(**TINY).on(Dataset("bare", {"train": {"x": np.zeros((3, 8, 8, 1))}, "test": {}}))
    flat = {k: {"x": v["x"].reshape(-1, 64), "label": v["label"]} for k, v in digits().splits.items()}
    with pytest.raises(UserError, match="--held-out 1 with --turned: only square images"):
        recipe.Recipe(**TINY).on(Dataset("flat", flat, {"num_classes": 10}))
    lame = digits()
    keep = lame["train"]["label"] != 6
    splits = {**lame.splits, "train": {k: v[keep] for k, v in lame["train"].items()}}
    with pytest.raises(UserError, match="class 6 of 'digits' has no training example"):
        recipe.Recipe(**TINY).on(Dataset("digits", splits, lame.info))
    with pytest.raises(DataError, match="no such file"):
        recipe.Recipe(data=Data("digits", str(tmp_path / "none"))).build()
