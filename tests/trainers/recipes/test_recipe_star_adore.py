"""star_adore's recipe: its run and what it leaves, real folders, a backbone, its claim's arms, and what it refuses."""

import json
import shutil

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.importers.importing import import_model
from checkpoints.model import load_model, save_model
from data.bm25 import BM25
from data.stream import DataError
from data.text import Tokenizer
from trainers.loop import Settings
from trainers.parallel import Parallel
from trainers.recipe import Data, UserError
from trainers.recipes.retrieval import star_adore as recipe
from trainers.retrieval import Texts, encode_all, figures_table, ranking_figures, search, text_collection
from trainers.run import train
from zoo.metrics import ranking
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.partitioning import unbox
from zoo.nn.retriever import DenseRetriever, WeightedWords

TINY = {"width": 16, "vocab_size": 400, "document_length": 24, "query_length": 12, "warmup_steps": 4, "star_steps": 4,
        "adore_steps": 4, "mined": 6, "top_k": 5, "batch_size": 8}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BEIR folder."""
    root = tmp_path_factory.mktemp("beir")
    made = text_collection(Data("synonyms"), 1)
    (root / "qrels").mkdir()
    rows = [json.dumps({"_id": i, "text": t}) for i, t in zip(made.document_ids, made.texts, strict=True)][:80]
    (root / "corpus.jsonl").write_text("\n".join(rows))
    pairs = [(q, d) for q, d in zip(made.judgements.query, made.judgements.document, strict=True) if d < 80]
    (root / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": f"q{q}", "text": made.queries[q]}) for q, _ in pairs)
    )
    for split, rows in (("train", pairs[:60]), ("test", pairs[60:80])):
        (root / "qrels" / f"{split}.tsv").write_text("\n".join(f"q{q}\td{d}\t1" for q, d in rows))
    return root


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A whole run on it."""
    work = tmp_path_factory.mktemp("run")
    made = recipe.Recipe(data=Data("beir", str(folder)), **TINY)
    return made, train("star_adore", made, work, Settings(Parallel(devices=1)), progress=False), work


def test_a_run_measures_every_stage_and_draws_it(done):
    _, found, work = done
    for stage in ("start/bm25_", "start/untrained_", "random/", "star/", "adore/"):
        assert 0 <= found["metrics"][f"{stage}mrr_at_10"] <= 1, stage
    assert found["summary"].startswith("MRR@10 on the test queries: BM25 0.") and "ADORE" in found["summary"]
    lines = (work / "ranking.txt").read_text().splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "BM25",
        "before training",
        "random negatives",
        "STAR",
        "ADORE",
    ]
    assert (work / "ranking.png").stat().st_size > 5000


def test_the_model_ranks_as_the_run_said(done, folder):
    made, found, work = done
    model = load_model(work / "model")
    texts = Texts.of(text_collection(made.data, 0), 12, 24, tokenizer=None, vocab_size=400)
    assert model.tokenizer().get_vocab() == texts.tokenizer.core.get_vocab()
    query = lambda p, x: model.definition.apply({"params": p}, x)  # noqa: E731
    test = texts.collection.splits["test"]
    documents = encode_all(query, model.variables["constants"]["documents"]["encoder"], texts.documents)
    vectors = encode_all(query, model.variables["params"], texts.queries[test])
    figures = ranking_figures(search(vectors, documents, 100), *texts.relevant(test))
    for k, v in figures.items():
        assert found["metrics"][f"adore/{k}"] == pytest.approx(v, abs=1e-6)
    # documents keep STAR's encoder, queries have moved on
    pairs = zip(jax.tree.leaves(model.variables["params"]),
                jax.tree.leaves(model.variables["constants"]["documents"]["encoder"]), strict=True)  # fmt: skip
    assert any(not np.array_equal(a, b) for a, b in pairs)


def test_bm25s_row_is_bm25(done, folder):
    made, found, _ = done
    collection = text_collection(made.data, 0)
    test = collection.splits["test"]
    ids = jnp.asarray(BM25(collection.documents).search([collection.queries[q] for q in test], 80)[1])
    relevant = jnp.asarray(collection.judgements.padded(test)[0])
    want = float(ranking.mean_over_queries(ranking.mrr_at_k(ids, relevant, 10), relevant))
    assert found["metrics"]["start/bm25_mrr_at_10"] == pytest.approx(want)


def test_mined_negatives_are_the_warm_models_and_never_relevant(done):
    made, _, work = done
    table = np.load(work / "artefacts" / "mine" / "negatives.npz")
    (name,) = table.files
    collection = text_collection(made.data, 0)
    train_queries = collection.splits["train"]
    relevant = collection.judgements.padded(train_queries)[0]
    assert table[name].shape == (len(train_queries), 6)
    assert not (table[name][:, :, None] == relevant[:, None, :]).any()


def test_a_backbone_is_where_the_encoder_starts(folder, tmp_path):
    collection = text_collection(Data(path=str(folder)), 0)
    tokenizer = Tokenizer.train(collection.documents, 300)
    body = BERT(BERTConfig(tokenizer.vocab_size, 16, 1, 2, 32, 32, pooler=True))
    variables = body.init(jax.random.key(5), jnp.ones((1, 4), jnp.int32))

    def beside(place):
        (place / "tokenizer").mkdir()
        tokenizer.write(place / "tokenizer" / "tokenizer.json")

    save_model(tmp_path / "bert", body, variables, {}, {}, beside)
    made = recipe.Recipe(data=Data(path=str(folder)), encoder="bert", backbone=str(tmp_path / "bert"), compare=False,
                         **{**TINY, "width": 999})  # fmt: skip
    run = made.build()
    params = run.init(jax.random.key(0))["params"]["encoder"]
    own = load_model(tmp_path / "bert").variables["params"]
    for part in ("embeddings", "layer0"):
        jax.tree.map(np.testing.assert_array_equal, unbox(params)["body"][part], own[part])
    assert unbox(params)["projection"]["kernel"].shape == (16, 16)
    longer = recipe.Recipe(data=Data(path=str(folder)), encoder="bert", backbone=str(tmp_path / "bert"),
                           **{**TINY, "document_length": 64})  # fmt: skip
    with pytest.raises(UserError, match="the backbone reads 32 tokens"):
        longer.build()


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    """A released retriever as it is imported, RoBERTa's special tokens beside it."""
    from tokenizers import Tokenizer as Core
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    root = tmp_path_factory.mktemp("retriever")
    source = golden_cases.FOLDER / "dense_retriever_ance"
    shutil.copytree(source, root / "source", ignore=shutil.ignore_patterns("io.npz", "case.json"))
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 53))]
    core = Core(WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = Whitespace()
    core.save(str(root / "source" / "tokenizer.json"))
    import_model(str(root / "source"), root / "model")
    return root / "model"


SHORT = {**TINY, "document_length": 16, "compare": False, "encoder": "bert"}


def test_a_retriever_as_backbone_starts_body_projection_and_norm(folder, retriever):
    made = recipe.Recipe(data=Data(path=str(folder)), backbone=str(retriever), **SHORT)
    run = made.build()
    params = run.init(jax.random.key(0))["params"]
    model = load_model(retriever)
    own = dict(model.variables["params"])
    own["body"] = {k: v for k, v in own["body"].items() if k != "pooler"}
    jax.tree.map(np.testing.assert_array_equal, unbox(params)["encoder"], own)
    # untrained, it is the published model
    found = run.export({"params": params, "constants": {"documents": params}}, {})
    assert (found.definition.features, found.definition.pad_id, found.definition.norm) == (16, 1, True)
    assert found.definition.pooling == "first" and not found.definition.body.config.pooler
    case = golden_cases.load("dense_retriever_ance")
    ids = jnp.asarray(case.inputs["padded.ids"])
    golden_cases.close(
        found.definition.apply({"params": found.variables["params"]}, ids), case.outputs["padded.vector"]
    )


def test_a_retriever_of_our_own_keeps_its_settings(folder, tmp_path):
    tokenizer = Tokenizer.train(text_collection(Data(path=str(folder)), 0).documents, 300)

    def beside(place):
        (place / "tokenizer").mkdir()
        tokenizer.write(place / "tokenizer" / "tokenizer.json")

    body = BERT(BERTConfig(tokenizer.vocab_size, 16, 1, 2, 32, 32))
    for name, module in {
        "mean": DenseRetriever(body, 8, "mean", norm=False, pad_id=tokenizer.pad),
        "words": DenseRetriever(WeightedWords(tokenizer.vocab_size, 8)),
        "pads": DenseRetriever(body, pad_id=tokenizer.pad + 1),
    }.items():
        save_model(tmp_path / name, module, module.init(jax.random.key(3), jnp.ones((1, 4), jnp.int32)), {}, {}, beside)
    build = lambda name: recipe.Recipe(  # noqa: E731
        data=Data(path=str(folder)), backbone=str(tmp_path / name), **SHORT
    ).build()
    run = build("mean")
    params = run.init(jax.random.key(0))["params"]
    jax.tree.map(
        np.testing.assert_array_equal, unbox(params)["encoder"], load_model(tmp_path / "mean").variables["params"]
    )
    found = run.export({"params": params, "constants": {"documents": params}}, {}).definition
    assert (found.features, found.pooling, found.norm) == (8, "mean", False)
    with pytest.raises(UserError, match=r"words is a DenseRetriever over WeightedWords; a text encoder"):
        build("words")
    with pytest.raises(UserError, match=f"pads with {tokenizer.pad + 1}, but its tokenizer with {tokenizer.pad}"):
        build("pads")


def test_a_small_transformer_runs_too(folder, tmp_path):
    made = recipe.Recipe(data=Data(path=str(folder)), encoder="bert", depth=1, compare=False,
                         **{**TINY, "width": 32, "adore_steps": 0, "warmup_steps": 0})  # fmt: skip
    found = train("star_adore", made, tmp_path / "run", Settings(Parallel(devices=1)), progress=False)
    assert "adore/mrr_at_10" not in found["metrics"] and "random/mrr_at_10" not in found["metrics"]


def test_steps_are_passes_over_the_queries_unless_given(folder):
    made = recipe.Recipe(data=Data(path=str(folder)), **{**TINY, "warmup_steps": -1, "star_steps": -1, "epochs": 3})
    steps = {p.name: p.steps for p in made.build().phases if p.name.endswith(("training", "warmup"))}
    per_epoch = -(-len(text_collection(made.data, 0).splits["train"]) // 8)
    assert steps == {"warmup": 3 * per_epoch, "random_training": 3 * per_epoch, "star_training": 3 * per_epoch,
                     "adore_training": 4}  # fmt: skip


def test_arms():
    assert recipe.arm("warm-up only", 0)["mrr_at_10"] > 0.5
    with pytest.raises(UserError, match="unknown arm 'best'"):
        recipe.arm("best", 0)


def test_table_of_figures():
    text = figures_table({"A": {"x": 0.5}, "longer name here": {"x": 1.0}})
    assert text.splitlines()[1].startswith("A ") and text.splitlines()[2].endswith("1.0000")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metric_cut": 0}, r"--metric-cut must be a positive int \(0 would zero the loss\), got 0"),
        ({"top_k": 0}, "--top-k must be at least 1, got 0"),
        ({"top_k": 601}, r"--top-k 601 must be in \[1, 600\], the number of documents"),
        ({"mined": 600}, "--mined 600 must be below 600"),
        ({"hard": 0}, "--hard must be at least 1"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"star_steps": 0}, "--star-steps must be at least 1, or -1 for --epochs passes; got 0"),
        ({"adore_steps": -2}, "--adore-steps must be at least 0, or -1 for --epochs passes; got -2"),
        ({"random_weight": -1.0}, "--random-weight must not be negative"),
        ({"query_length": 2}, "a row needs at least 3 tokens, got length 2"),
        ({"vocab_size": 3}, "--vocab-size must be at least 6"),
        ({"width": 700}, "--width 700 with --start lsa: features must be in"),
        ({"encoder": "bert", "width": 40}, "--width 40 must be a multiple of 32"),
        ({"backbone": "somewhere"}, "--backbone somewhere needs --encoder bert"),
        ({"backbone": "nowhere", "encoder": "bert"}, "--backbone nowhere: "),
        ({"data": Data("cranfield")}, "--data.name cranfield needs --data.path DIR"),
        ({"data": Data("marco")}, "--data.name 'marco' is unknown; use synonyms"),
    ],
)
def test_impossible_settings_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        recipe.Recipe(**change).build()


def test_too_few_documents_to_mine_from_are_named(folder, tmp_path):
    made = recipe.Recipe(data=Data(path=str(folder)), compare=False, **{**TINY, "mined": 79})
    qrels = folder / "qrels" / "train.tsv"
    text = qrels.read_text()
    first = text.splitlines()[0].split("\t")
    extra = next(f"d{i}" for i in range(80) if f"d{i}" != first[1])
    try:
        qrels.write_text(f"{text}\n{first[0]}\t{extra}\t1")
        with pytest.raises(
            UserError, match=r"--mined 79 negatives are more than the corpus has for 1 training queries \(first"
        ):
            train("star_adore", made, tmp_path / "run", Settings(Parallel(devices=1)), progress=False)
    finally:
        qrels.write_text(text)
    with pytest.raises(DataError, match="there is no such folder"):
        recipe.Recipe(data=Data(path=str(tmp_path / "nowhere"))).build()


@pytest.mark.claim
def test_the_claim():
    import zoo
    from trainers.claims import run_claim

    found = run_claim(zoo.card("star_adore"), 5)
    assert found["verdict"] == "confirmed", json.dumps(found["paired"])
