"""The model replacement protocol: galleries that stay, figures, fresh optimisers, lineage, resumption."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from checkpoints.store import Store
from data.stream import evaluation_stream, training_stream
from trainers import protocols
from trainers.compatibility import draw_matrix, matrices_figure
from trainers.errors import Interrupted, UserError
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel
from trainers.protocols import ModelUpdate, compatibility_of, fresh_optimizer, model_replacement
from trainers.recipe import Run
from trainers.run import train_in_memory
from trainers.trees import flatten, to_host
from zoo.base import Loss, Objective, example_elements
from zoo.metrics.compatibility import average_accuracy, average_compatibility, compatibility_matrix
from zoo.ops.lineage import comparable

RNG = np.random.default_rng(0)
MEANS = RNG.normal(size=(4, 6))


def part(n):
    label = (np.arange(n) % 4).astype(np.int32)
    return {"x": (MEANS[label] + 0.9 * RNG.normal(size=(n, 6))).astype(np.float32), "label": label}


TRAIN, QUERIES, GALLERY = part(32), part(22), part(13)


def linear():
    """Pulls features towards a fixed target; nothing more is needed to have weights that move."""

    def forward(variables, batch, context):
        return {"embedding": batch["x"] @ variables["params"]["w"]}, {}

    def loss(outputs, batch, context):
        return Loss(example_elements(jnp.sum((outputs["embedding"] - 1.0) ** 2, -1), batch))

    return Objective(lambda rng, batch: {}, forward, loss, provides=("embedding",), name="linear")


def embed(variables, batch, context):
    return batch["x"] @ variables["params"]["w"]


def frame(variables):
    return variables["constants"]["frame"]


def update(name, size=5, fresh=True, mark=0.0, aligned=True, parent=True, steps=3):
    def start(variables, artefacts, rng):
        w = jax.random.normal(rng, (6, size)) if fresh else variables["params"]["w"]
        constants = {"frame": jnp.full(2, mark)}
        if parent and "constants" in variables:
            constants["lineage"] = variables["constants"]["lineage"]
        return {"params": {"w": w}, "constants": constants}

    stream = training_stream(TRAIN, 16)
    return ModelUpdate(name, linear(), stream, steps, optax.sgd(0.01, 0.9), start, embed, frame, aligned)


def phases(updates, **rest):
    return model_replacement(updates, evaluation_stream(QUERIES, 8), evaluation_stream(GALLERY, 8), 4, **rest)


def cut(queries, gallery):
    size = min(queries.shape[1], gallery.shape[1])
    return queries[:, :size], gallery[:, :size]


def test_the_matrix_is_that_of_the_features(tmp_path):
    updates = [update("a"), update("b"), update("c", fresh=False)]
    found = train_in_memory(Run(phases(updates, name="x_"), export=None))
    names = ["a", "b", "c"]
    matrix = compatibility_of(found.artefacts, names)
    galleries = [found.artefacts[f"gallery_{n}"]["features"] for n in names]
    last = QUERIES["x"] @ found.variables["params"]["w"]
    expected = compatibility_matrix([last] * 3, galleries, QUERIES["label"], GALLERY["label"], 4, full=True)[2]
    np.testing.assert_allclose(matrix[2], expected, atol=1e-6)
    np.testing.assert_allclose(galleries[2], GALLERY["x"] @ found.variables["params"]["w"], atol=1e-5)
    np.testing.assert_array_equal(found.artefacts["gallery_a"]["label"], GALLERY["label"])
    for i, n in enumerate(names):
        assert [found.metrics[f"{n}_gallery/against_{m}"] for m in names[: i + 1]] == pytest.approx(matrix[i, : i + 1])
    assert np.isnan(matrix[0, 1:]).all()
    summary = {k.split("/")[1]: v for k, v in found.metrics.items() if k.startswith("x_compatibility/")}
    assert summary["average_compatibility"] == pytest.approx(average_compatibility(matrix))
    assert summary["average_accuracy"] == pytest.approx(average_accuracy(matrix))
    assert summary["self_accuracy"] == pytest.approx(np.diag(matrix).mean())
    assert summary["cross_accuracy"] == pytest.approx((matrix[1, 0] + matrix[2, 0] + matrix[2, 1]) / 3)
    assert [found.metrics[f"{n}_gallery/incomparable"] for n in names] == [0, 0, 0]
    matrices_figure({"x": names}, {"x": "title"}, (0, 1))(found, tmp_path)
    assert (tmp_path / "compatibility.png").stat().st_size > 3000


def test_every_model_is_run_once_over_queries_and_gallery(monkeypatch):
    passes, real = [], protocols.encoder

    def counted(forward):
        encode = real(forward)
        return lambda variables, stream: (passes.append(stream.num_examples), encode(variables, stream))[1]

    monkeypatch.setattr(protocols, "encoder", counted)
    train_in_memory(Run(phases([update("a", steps=1), update("b", steps=1), update("c", steps=1)]), export=None))
    assert passes == [22, 13] * 3


def test_lineage_follows_the_chain():
    found = train_in_memory(Run(phases([update("a"), update("b", mark=1.0)]), export=None))
    a, b = (jax.tree.map(jnp.asarray, found.artefacts[f"gallery_{n}"]["lineage"]) for n in "ab")
    assert not np.array_equal(a["frame"], b["frame"])
    assert comparable(b, a) and not comparable(a, b)  # b was aligned to a
    np.testing.assert_array_equal(b["parents"][0], a["id"])
    np.testing.assert_array_equal(found.variables["constants"]["lineage"]["id"], b["id"])


def test_models_that_cannot_be_compared_stop_the_run():
    strangers = [update("a"), update("b", mark=1.0, aligned=False)]
    with pytest.raises(UserError, match="b and a: features of query model .* cannot be compared"):
        train_in_memory(Run(phases(strangers), export=None))
    found = train_in_memory(Run(phases(strangers, refuse=False), export=None))
    assert [found.metrics[f"{n}_gallery/incomparable"] for n in "ab"] == [0, 1]
    orphan = [update("a"), update("b", mark=1.0, parent=False)]
    with pytest.raises(UserError, match="b and a"):
        train_in_memory(Run(phases(orphan), export=None))


def test_feature_sizes_may_differ_with_an_alignment():
    updates = [update("a"), update("b", size=7)]
    with pytest.raises(UserError, match="b yields 7-d features, the gallery of a holds 5-d ones"):
        train_in_memory(Run(phases(updates), export=None))
    found = train_in_memory(Run(phases(updates, align=cut), export=None))
    w = found.variables["params"]["w"]
    expected = compatibility_matrix([QUERIES["x"] @ w[:, :5]] * 2, [found.artefacts["gallery_a"]["features"]] * 2,
                                    QUERIES["label"], GALLERY["label"], 4)[1, 0]  # fmt: skip
    assert found.metrics["b_gallery/against_a"] == pytest.approx(expected)


def test_dead_features_are_counted():
    def start(variables, artefacts, rng):
        return {"params": {"w": jnp.zeros((6, 5))}, "constants": {"frame": jnp.zeros(2)}}

    dead = update("a", steps=1)
    dead = ModelUpdate(dead.name, dead.objective, dead.stream, 1, optax.sgd(0.0), start, embed, frame)
    found = train_in_memory(Run(phases([dead]), export=None))
    assert found.metrics["a_gallery/zero_features"] == 22 + 13 and found.metrics["a_gallery/against_a"] == 0
    assert "compatibility/cross_accuracy" not in found.metrics


def test_a_run_cut_at_every_save_is_the_same_run(tmp_path):
    def loop(**rest):
        updates = [update("a", steps=2), update("b", size=7, steps=2), update("c", size=7, fresh=False, steps=2)]
        return Loop(Run(phases(updates, align=cut), export=None), Settings(Parallel(devices=1), 1, 1, 1), 3, **rest)

    whole, cuts = loop()(), 0
    for _ in range(20):
        again = loop(store=Store(tmp_path / "c"), folder=tmp_path)
        again.asked = 15
        try:
            cut_up = again()
            break
        except Interrupted:
            cuts += 1
    assert cuts >= 9
    first, second = flatten(to_host(whole.state)), flatten(to_host(cut_up.state))
    assert first.keys() == second.keys()
    for path in first:
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)
    assert whole.metrics == cut_up.metrics


def test_fresh_optimizers():
    assert fresh_optimizer(None, {}) is None
    state = fresh_optimizer(optax.adam(0.1), {"w": jnp.ones(3)})("anything")
    assert state[0].mu["w"].shape == (3,) and int(state[0].count) == 0


def test_numbers_on_the_heat_map():
    from trainers import plots

    _, axes = plots.figure()
    draw_matrix(axes[0, 0], np.array([[0.5, np.nan], [0.6, 0.9]]), "name", (1,))
    texts = {t.get_text(): t.get_fontweight() for t in axes[0, 0].texts}
    assert texts == {"0.50": "normal", "0.60": "bold", "0.90": "normal"}
    assert axes[0, 0].get_title() == "name\nAC 1.00, AA 66.7"
    assert [t.get_text() for t in axes[0, 0].get_xticklabels()] == ["1", "2*"]
    assert axes[0, 0].get_xlabel() == "gallery of model (* put in from elsewhere)"
    draw_matrix(axes[0, 0], np.array([[0.5]]), "alone")
    assert axes[0, 0].get_xlabel() == "gallery of model"
