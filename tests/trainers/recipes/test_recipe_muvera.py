"""muvera's recipe: its run, what it exports, its claim's arms, and the settings it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.model import load_model
from data.stream import DataError
from data.token_sets import topic_token_sets
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.retrieval import muvera as recipe
from trainers.run import train
from zoo.retrieval import muvera


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A collection on disk: ragged documents, padded queries and pairs."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    unit = lambda *s: (lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32))(rng.normal(size=s))  # noqa: E731
    for name in ("documents", "queries"):
        (root / name).mkdir()
    lengths = rng.integers(1, 6, 30)
    np.save(root / "documents" / "emb.npy", unit(lengths.sum(), 8))
    np.save(root / "documents" / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    np.save(root / "queries" / "emb.npy", unit(7, 4, 8))
    np.save(root / "queries" / "lengths.npy", rng.integers(1, 5, 7))
    np.save(root / "qrels.npy", np.array([[0, 3], [0, 4], [6, 29]]))
    return root


SMALL = {"num_repetitions": 3, "num_simhash": 2, "d_proj": 4, "k": 3, "num_candidates": 30, "compare": False}


def run(into, **change):
    found = train("muvera", recipe.Recipe(**{**SMALL, **change}), into, Settings(Parallel(devices=1)), progress=False)
    return found["metrics"]


@pytest.mark.slow
def test_a_run_on_files_leaves_a_model_that_searches(folder, tmp_path):
    metrics = run(tmp_path, data=Data(path=str(folder)), compare=True)
    assert metrics["measure/reranked_recall_1_at_1"] == 1 and metrics["measure/reranked_overlap_at_k"] == 1
    assert metrics["measure/scorer_calls_per_query"] == 30 == metrics["measure/recall_1_at_10"] * 0 + 30
    assert metrics["index/output_dim"] == 3 * 4 * 4 and metrics["index/bytes_per_document"] == 4 * 48
    assert (tmp_path / "recall.png").stat().st_size > 1000 and (tmp_path / "curves.png").exists()
    model = load_model(tmp_path / "model")
    assert model.definition == muvera.FDEConfig(8, 3, 2, 4)
    index = muvera.index_from_arrays(model.definition, model.variables["index"])
    muvera.check_fingerprint(index, muvera.params_from_arrays(model.definition, model.variables["constants"]["fde"]))
    queries = np.load(folder / "queries" / "emb.npy")
    mask = np.arange(4) < np.load(folder / "queries" / "lengths.npy")[:, None]
    found = muvera.muvera_search(index, jnp.asarray(queries), jnp.asarray(mask), 3, 30)
    # exhaustive search by the definition, over the ragged files
    emb, offsets = np.load(folder / "documents" / "emb.npy"), np.load(folder / "documents" / "offsets.npy")
    sets = [emb[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    exact = np.array(
        [[sum(max(float(t @ p) for p in s) for t in q[m]) for s in sets] for q, m in zip(queries, mask, strict=True)]
    )
    np.testing.assert_array_equal(found.ids, np.argsort(-exact, 1)[:, :3])
    expected = [len({3, 4} & set(np.argsort(-exact[0])[:3])) / 2, float(29 in np.argsort(-exact[6])[:3])]
    assert metrics["measure/qrels_recall_at_k"] == pytest.approx(np.mean(expected))
    # started again, it is complete
    assert train("muvera", recipe.Recipe(**{**SMALL, "compare": True}, data=Data(path=str(folder))), tmp_path,
                 Settings(Parallel(devices=1)), progress=False)["already"]  # fmt: skip


@pytest.mark.slow
def test_quantised_bf16_projected_and_carved_runs(folder, tmp_path):
    data = Data(path=str(folder))
    metrics = run(tmp_path / "a", data=data, pq_group=8, pq_centroids=16, final_dim=16, final_projection="count_sketch")
    assert metrics["index/bytes_per_document"] == 2 and metrics["measure/reranked_recall_1_at_1"] == 1
    metrics = run(tmp_path / "b", data=data, dtype="bfloat16", ball_tau=0.9, d_proj=0, fill_empty=False)
    assert metrics["index/bytes_per_document"] == 2 * 3 * 4 * 8
    index = load_model(tmp_path / "b" / "model").variables["index"]
    assert index["fdes_bits"].dtype == jnp.uint16 and "proj" not in index["params"]


def test_measures():
    found = np.array([[4, 2, 1], [0, 1, 2], [3, 0, 1]])
    np.testing.assert_allclose(recipe.recall_by_depth(found, np.array([2, 0, 9])), [1 / 3, 2 / 3, 2 / 3])
    assert recipe.overlap(found, np.array([[1, 2, 4], [0, 1, 9], [7, 8, 9]])) == pytest.approx((1 + 2 / 3 + 0) / 3)
    qrels = {"query": np.array([0, 0, 2]), "document": np.array([4, 9, 0])}
    assert recipe.qrels_recall(found, qrels) == pytest.approx((0.5 + 1) / 2)
    tokens = jnp.asarray([[[1.0, 2], [3, 4], [9, 9]]])
    np.testing.assert_allclose(recipe.mean_pooled(tokens, jnp.asarray([[True, True, False]])), [[2, 3]])


def test_the_benchmarks_reference_is_the_encoding():
    params = muvera.init_fde(jax.random.key(0), muvera.FDEConfig(6, 2, 3, 4))
    x = jax.random.normal(jax.random.key(1), (3, 4, 6))
    expected = recipe.numpy_encoding(params, x, True, True)
    np.testing.assert_allclose(muvera.encode_document_fde(params, x), expected, atol=1e-5)
    np.testing.assert_allclose(
        muvera.encode_query_fde(params, x), recipe.numpy_encoding(params, x, False, False), atol=1e-5
    )


def test_arms_are_paired_and_named():
    found = {a: recipe.arm(a, 0) for a in ("fde (20, 5, 16)", "mean pooling", "random ranking")}
    rows = [found[a]["recall_1_at_1"] for a in found]
    assert rows[0] >= 0.9 and rows[0] >= rows[1] + 0.2 and rows[1] > rows[2] + 0.2
    assert found["random ranking"]["recall_1_at_100"] == pytest.approx(0.25, abs=0.2)
    data = topic_token_sets(0)
    pooled = data["queries"]["tokens"].mean(1) @ data["documents"]["tokens"].mean(1).T
    exact = np.asarray(muvera.chamfer(*(jnp.asarray(data[s]["tokens"]) for s in ("queries", "documents"))))
    assert rows[1] == pytest.approx(np.mean(pooled.argmax(1) == exact.argmax(1)))
    with pytest.raises(UserError, match="unknown arm 'nothing'"):
        recipe.arm("nothing", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_proj": 33}, r"--d-proj 33 must be in \[0, 32\]"),
        ({"d_proj": -1}, r"--d-proj -1 must be in \[0, 32\]"),
        ({"num_simhash": 31}, r"--num-simhash must be in \[0, 30\], got 31"),
        ({"num_repetitions": 0}, "num_repetitions must be at least 1"),
        ({"k": 60}, "need 1 <= --k 60 <= --num-candidates 50 <= 400 documents"),
        ({"num_candidates": 401}, "--num-candidates 401"),
        ({"pq_group": 7}, "--pq-group 7 must divide the encodings' 10240 dimensions"),
        ({"pq_group": 8, "pq_centroids": 0}, "--pq-centroids must be at least 1"),
        ({"ball_tau": 1.5}, r"--ball-tau must be in \[-1, 1\]"),
        ({"final_dim": -1}, "final_dim must be at least 1"),
        ({"data": Data("colbert")}, "--data.name 'colbert' is unknown; use topics, or --data.path DIR"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        recipe.Recipe(**change).build()


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        recipe.Recipe(data=Data(path=str(tmp_path / "nowhere"))).build()
    np.save(tmp_path / "emb.npy", np.ones((4, 3), np.float32) * 7)
    np.save(tmp_path / "offsets.npy", np.array([0, 3, 2, 4]))
    with pytest.raises(DataError, match="offsets are not monotone"):
        recipe.Recipe(data=Data(path=str(tmp_path)), d_proj=0).build()
    np.save(tmp_path / "offsets.npy", np.array([0, 3, 4]))
    with pytest.warns(UserWarning, match="documents are not of unit length"):
        recipe.Recipe(data=Data(path=str(tmp_path)), d_proj=0, k=1, num_candidates=2).build()


@pytest.mark.claim
def test_the_claim():
    import zoo
    from trainers.claims import run_claim

    found = run_claim(zoo.card("muvera"), 5)
    assert found["verdict"] == "confirmed", json.dumps(found["paired"])
