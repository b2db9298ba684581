"""relative_representations' recipe: runs on latents and images, what it exports, its claim's arms, refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.model import load_model
from data.latents import rotated_latents
from data.stream import DataError
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.representation import relative_representations as recipe
from trainers.run import train
from trainers.stitching import likeness, stitching_metrics, stitching_table
from zoo.nn.stitching_heads import StitchingHead
from zoo.representation.relative_representations import relative_projection


def run(into, **change):
    settings = Settings(Parallel(devices=1))
    return train("relative_representations", recipe.Recipe(**change), into, settings, progress=False)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Three models on disk: two rotated copies of one width, and a wider one."""
    root = tmp_path_factory.mktemp("latents")
    made = rotated_latents(0, samples=150, classes=3, noise=0.02)[0]
    np.savez(root / "mine.npz", **made.models, labels=made.labels, train=made.train)
    own = {f"{k}/encoding": v for k, v in made.models.items()}
    own |= {f"{k}/anchors_latents": v[:9] for k, v in made.models.items()}
    np.savez(root / "anchored.npz", **own, labels=made.labels)
    return root


def test_your_own_latents_are_stitched_and_the_table_printed(latents, tmp_path):
    found = run(tmp_path, data=Data(path=str(latents / "mine.npz")), anchors=24, head_steps=150, batch_size=32)
    m = found["metrics"]
    assert m["stitching/relative_own"] > 0.9 and m["stitching/relative_stitched"] > m["stitching/relative_own"] - 0.05
    assert m["stitching/absolute_own"] > 0.9 and m["stitching/absolute_stitched"] < 0.75
    assert m["stitching/relative_mrr"] > 0.9 > 0.5 > m["stitching/absolute_mrr"]
    assert "stitching/absolute_0_2" not in m and "stitching/absolute_2_2" in m
    first, *table = found["summary"].splitlines()
    assert first.startswith("test accuracy: relative own") and "reconstruction" not in first
    assert (tmp_path / "stitching.txt").read_text().splitlines() == table
    assert table[0].split() == ["model0", "model1", "model2"] and table[1].rstrip().endswith("/ -")
    assert (tmp_path / "stitching.png").stat().st_size > 1000 and not (tmp_path / "reconstructions.png").exists()
    # the exported head reads relative representations of any of the models
    model = load_model(tmp_path / "model")
    assert model.definition == StitchingHead(3) and set(model.variables["constants"]["heads"]) >= {"relative2"}
    with np.load(latents / "mine.npz") as file:
        arrays = {k: file[k] for k in file.files}
    rows, kept = ~arrays["train"], model.variables["constants"]
    ids = np.asarray(kept["anchor_ids"])
    for i, name in enumerate(("model0", "model1", "model2")):
        anchors = arrays[name][arrays["train"]][ids]
        np.testing.assert_allclose(kept["anchors"][f"m{i}"], anchors, rtol=1e-6)
        r = relative_projection(jnp.asarray(arrays[name][rows]), jnp.asarray(anchors))
        hit = np.mean(np.argmax(model.apply(r), 1) == arrays["labels"][rows])
        assert hit == pytest.approx(m[f"stitching/relative_{i}_0"], abs=1e-6)


@pytest.mark.slow
def test_your_own_anchors_are_used(latents, tmp_path):
    found = run(tmp_path, data=Data(path=str(latents / "anchored.npz")), head_steps=3, batch_size=16, bin_size=0.2)
    assert found["metrics"]["anchors/anchors"] == 9
    anchors = load_model(tmp_path / "model").variables["constants"]["anchors"]["m2"]
    with np.load(latents / "anchored.npz") as file:
        np.testing.assert_allclose(anchors, file["model2/anchors_latents"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variational", [False, True])
def test_images_train_encoders_and_autoencoders(tmp_path, variational):
    found = run(tmp_path, widths=(16, 16), hidden=32, anchors=24, anchor_method="stratified", encoder_steps=60,
                head_steps=80, ae_steps=120, ae_widths=(8, 16), variational=variational,
                standardise="batch", subspaces=2)  # fmt: skip
    m = found["metrics"]
    assert m["stitching/relative_own"] > 0.7 and m["stitching/relative_stitched"] > m["stitching/absolute_stitched"]
    assert m["pictures/relative_stitched_mse"] < m["pictures/absolute_stitched_mse"]
    assert (tmp_path / "reconstructions.png").stat().st_size > 1000 and "reconstruction MSE" in found["summary"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": 0}, "--anchors must be at least 1, got 0"),
        ({"anchors": 5000}, "--anchors 5000 are more than the 1437 training items"),
        ({"head_steps": 0}, "--head-steps must be at least 1"),
        ({"ae_steps": -1}, "--ae-steps, --bin-size and --top-m must not be negative"),
        ({"bin_size": -0.1}, "must not be negative"),
        ({"widths": (64,)}, "--widths needs two encoders or more"),
        ({"widths": (64, 0)}, "--widths needs two encoders or more"),
        ({"ae_widths": ()}, "--ae-widths needs one layer or more"),
        ({"subspaces": 7}, "--subspaces 7 must divide every model's width; one has 64"),
        ({"anchor_method": "top_m", "top_m": 20}, r"--top-m 20 must be in \[64, 1437\]"),
        ({"data": Data("mixture")}, "autoencoders need images, not points of shape .* --ae-steps 0"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        recipe.Recipe(**change).build()


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(DataError, match=r"not a readable .npz"):
        recipe.Recipe(data=Data(path=str(tmp_path / "bad.npz"))).build()
    np.savez(tmp_path / "zero.npz", a=np.zeros((20, 2)), b=np.ones((20, 2)), labels=np.arange(20) % 2)
    with pytest.raises(UserError, match=r"model a: the latent of anchor 0 \(id \d+\) has zero length"):
        run(tmp_path / "run", data=Data(path=str(tmp_path / "zero.npz")), anchors=1, anchor_method="farthest")
    np.savez(tmp_path / "images.npz", x=np.zeros((9, 4, 4), np.uint8))
    with pytest.raises(UserError, match="has no labels; heads need them"):
        recipe.Recipe(data=Data(path=str(tmp_path / "images.npz"))).build()


def test_metrics_and_table_of_known_numbers():
    tables = {"relative": np.array([[0.9, 0.8], [0.6, 0.7]]), "absolute": np.array([[0.5, np.nan], [np.nan, 0.3]])}
    found = stitching_metrics(tables)
    assert found["relative_own"] == pytest.approx(0.8) and found["relative_stitched"] == pytest.approx(0.7)
    assert found["absolute_own"] == pytest.approx(0.4) and "absolute_stitched" not in found
    assert found["relative_0_1"] == 0.8 and found["relative_1_0"] == 0.6 and "absolute_0_1" not in found
    text = stitching_table({f"stitching/{k}": v for k, v in found.items()}, ("one", "two")).splitlines()
    assert text[0].split() == ["one", "two"] and text[1].split() == ["one", "0.900", "/", "0.500", "0.800", "/", "-"]
    assert text[2].split() == ["two", "0.600", "/", "-", "0.700", "/", "0.300"]
    a = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3)), jnp.float32)
    same = likeness({"a": a, "b": 2 * a}, {"m0": a[:4], "m1": 2 * a[:4]}, relative_projection)
    assert all(v == pytest.approx(1, abs=1e-5) for v in same.values()) and len(same) == 8
    wider = likeness({"a": a, "b": jnp.ones((9, 4))}, {"m0": a[:4], "m1": jnp.ones((4, 4))}, relative_projection)
    assert set(wider) == {f"relative_{k}" for k in ("jaccard", "mrr", "cosine")}


def test_arms_are_named_and_the_split_depends_on_the_seed():
    trivial = recipe.arm("most frequent class", 0)
    assert 0.05 < trivial["stitched_accuracy"] < 0.15
    with pytest.raises(UserError, match="unknown arm 'nothing'"):
        recipe.arm("nothing", 0)
    a, b = recipe.resplit_digits(0), recipe.resplit_digits(1)
    assert a["test"]["x"].shape == (360, 8, 8, 1) and a["train"]["x"].shape == (1437, 8, 8, 1)
    assert not np.array_equal(a["test"]["label"], b["test"]["label"])


@pytest.mark.claim
def test_the_claim():
    import zoo
    from trainers.claims import run_claim

    found = run_claim(zoo.card("relative_representations"), 5)
    assert found["verdict"] == "confirmed", json.dumps(found["paired"])
