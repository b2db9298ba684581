"""The model replacement protocol: galleries that stay, figures, fresh optimisers, lineage, resumption."""

import dataclasses

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
from trainers.protocols import (
    ModelUpdate,
    compatibility_of,
    fresh_optimizer,
    model_replacement,
    prototype_pass,
    same_set_retrieval,
)
from trainers.recipe import Run
from trainers.run import train_in_memory
from trainers.trees import flatten, to_host
from zoo.base import Loss, Objective, example_elements
from zoo.metrics.compatibility import average_accuracy, average_compatibility, compatibility_matrix
from zoo.ops.lineage import comparable, lineage

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


def test_sequences_share_a_model(tmp_path):
    """A second sequence follows a model that the first one trained, from what that model left."""
    kept = {"keep": lambda variables: {"params": variables["params"]}}
    old = dataclasses.replace(update("old"), **kept)
    first, second = update("b"), update("c")

    def from_old(variables, artefacts, rng):
        left = artefacts["model_old"]
        return {"params": left["params"], "constants": {"frame": jnp.ones(2), "lineage": left["lineage"]}}

    second = dataclasses.replace(second, start=from_old, prepare=(
        prototype_pass("means", lambda v, a: {"params": a["model_old"]["params"]}, embed,
                       evaluation_stream(TRAIN, 5), 4),
    ))  # fmt: skip
    one = phases([old, first], name="one_")
    two = phases([second], name="two_", earlier=[old], before=first.optimizer)
    assert [p.name for p in two] == ["means", "c_start", "c", "c_gallery", "two_compatibility"]
    found = train_in_memory(Run([*one, *two], export=None))
    w = np.asarray(found.artefacts["model_old"]["params"]["w"])
    np.testing.assert_allclose(found.artefacts["gallery_old"]["features"], GALLERY["x"] @ w, atol=1e-5)
    means = [(TRAIN["x"] @ w)[TRAIN["label"] == c].mean(0) for c in range(4)]
    np.testing.assert_allclose(found.artefacts["means"], means, atol=1e-5)
    assert found.metrics["means/smallest_class"] == 8
    matrix = compatibility_of(found.artefacts, ["old", "c"])
    assert found.metrics["two_compatibility/self_accuracy"] == pytest.approx((matrix[0, 0] + matrix[1, 1]) / 2)
    assert found.metrics["c_gallery/incomparable"] == 0
    a, c = (found.artefacts[f"gallery_{n}"]["lineage"] for n in ("old", "c"))
    np.testing.assert_array_equal(c["parents"][0], a["id"])


def test_a_class_without_images_stops_the_prototype_pass():
    few = {k: v[TRAIN["label"] != 2] for k, v in TRAIN.items()}
    passed = prototype_pass("means", lambda v, a: v, embed, evaluation_stream(few, 8), 4)
    with pytest.raises(UserError, match="means: no image of class 2: a prototype needs at least one"):
        passed.fit({"params": {"w": jnp.ones((6, 2))}}, {}, None)


def test_a_model_from_elsewhere_is_not_trained_and_keeps_its_record():
    record = lineage(jnp.ones(3), jnp.ones(4))

    def start(variables, artefacts, rng):
        return {"params": {"w": jnp.eye(6)[:, :5]}, "constants": {"lineage": record}}

    given = dataclasses.replace(update("a", steps=1), steps=0, start=start)
    found = train_in_memory(Run(phases([given, update("b")]), export=None))
    np.testing.assert_allclose(found.artefacts["gallery_a"]["features"], GALLERY["x"][:, :5], atol=1e-6)
    for k, v in record.items():
        np.testing.assert_array_equal(found.artefacts["gallery_a"]["lineage"][k], v)
    np.testing.assert_array_equal(found.artefacts["gallery_b"]["lineage"]["parents"][0], record["id"])


def test_another_measure():
    updates = [update("a", size=2), update("b", size=3)]

    def run(**rest):
        made = model_replacement(updates, evaluation_stream(QUERIES, 8), evaluation_stream(QUERIES, 8), 4, **rest)
        return train_in_memory(Run(made, export=None))

    found = run(align=cut, measure=same_set_retrieval)
    galleries = [found.artefacts[f"gallery_{n}"] for n in "ab"]
    queries = QUERIES["x"] @ np.asarray(found.variables["params"]["w"])
    for name, kept in zip("ab", galleries, strict=True):
        q, g = cut(queries, kept["features"])
        want = {"top1": [], "top5": [], "map": []}
        s = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (g / np.linalg.norm(g, axis=1, keepdims=True)).T
        for i, label in enumerate(QUERIES["label"]):
            hit = [QUERIES["label"][j] == label for j in np.argsort(-s[i]) if j != i]
            want["top1"].append(hit[0])
            want["top5"].append(any(hit[:5]))
            want["map"].append(np.mean([sum(hit[: n + 1]) / (n + 1) for n in range(len(hit)) if hit[n]]))
        got = {k: found.metrics[f"b_gallery/against_{name}{end}"] for k, end in
               (("top1", ""), ("top5", "_top5"), ("map", "_map"))}  # fmt: skip
        assert got == pytest.approx({k: np.mean(v) for k, v in want.items()}, abs=1e-5)
    assert galleries[1]["row"][0] == found.metrics["b_gallery/against_a"]

    def refuse(queries, gallery):
        raise ValueError("too short")

    with pytest.raises(UserError, match="a and the gallery of a: too short"):
        run(align=refuse)


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
    draw_matrix(axes[0, 0], np.array([[0.5, np.nan], [0.6, 0.9]]), "name", (1,), names=("old", "new"))
    assert [t.get_text() for t in axes[0, 0].get_yticklabels()] == ["old", "new*"]
    draw_matrix(axes[0, 0], np.array([[0.5]]), "alone")
    assert axes[0, 0].get_xlabel() == "gallery of model"
