"""Bad input to the retrieval family's recipes, through the command: exit 2, one clear line, nothing written."""

import json

import numpy as np
import pytest
from command import contents, refused


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, which must stay as it was."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("star_adore", "--metric-cut", "0"), ("--metric-cut", "would zero the loss", "got 0")),
        (("star_adore", "--top-kk", "3"), ("'--top-kk'", "--top-k")),
        (("star_adore", "--data.name", "cranfield"), ("cranfield", "--data.path")),
        (("star_adore", "--data.path", "nowhere"), ("nowhere", "no such folder")),
        (("star_adore", "--encoder", "bert", "--backbone", "nowhere"), ("--backbone nowhere",)),
        (("retrieval_extrapolation", "--buckets", "1"), ("--buckets", "[2, 3000]")),
        (("retrieval_extrapolation", "--protocol", "restain"), ("'restain'", "restrain")),
        (("leanvec", "--dim", "0"), ("--dim", "0")),
        (("leanvec", "--k", "60"), ("--num-candidates",)),
        (("leanvec", "--primary", "lvq3"), ("'lvq3'", "lvq4")),
        (("leanvec", "--metric", "l2"), ("--metric l2", "--maps pca")),
        (("dbnorm", "--beta1", "0"), ("beta1", "positive")),
        (("dbnorm", "--k", "0"), ("k must be",)),
        (("cosine_adapter", "--mapping", "cubic"), ("'cubic'", "quadratic")),
        (("cosine_adapter", "--target-recall", "2"), ("--target-recall", "2")),
        (("omnimatch", "--k", "0"), ("--k", "0")),
        (("omnimatch", "--data.path", "nowhere"), ("nowhere",)),
        (("gear", "--tau", "0"), ("tau", "positive")),
        (("gear", "--queue-size", "33"), ("queue",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_settings(here, capsys, argv, says):
    refused(capsys, "train", *argv, "--workdir", "w", says=says)
    assert not contents(here)


def collection(folder):
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": f"d{i}", "text": f"word{i} common"}) for i in range(5)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": f"q{i}", "text": f"word{i}"}) for i in range(4)))
    (folder / "qrels" / "test.tsv").write_text("\n".join(f"q{i}\td{i}\t1" for i in range(4)))
    return folder


def test_files(here, capsys):
    beir = collection(here / "beir")
    (beir / "qrels" / "test.tsv").write_text("q1\td77\t1\n")
    before = contents(here)
    refused(capsys, "train", "star_adore", "--data.path", beir, "--workdir", "w", says=("not in corpus.jsonl: d77",))
    refused(capsys, "train", "retrieval_extrapolation", "--data.path", beir, "--workdir", "w", says=("d77",))
    np.save(here / "base.npy", np.full((3, 2), np.nan, np.float32))
    np.save(here / "queries.npy", np.ones((3, 2), np.float32))
    before = contents(here)
    refused(capsys, "train", "leanvec", "--data.path", here, "--workdir", "w", says=("base.npy",))
    assert contents(here) == before


def test_a_collection_too_small_for_the_defaults_says_what_to_change(here, capsys):
    beir = collection(here / "beir")
    refused(capsys, "train", "star_adore", "--data.path", beir, "--workdir", "w", says=("--top-k 100", "[1, 5]"))
    refused(
        capsys, "train", "star_adore", "--data.path", beir, "--workdir", "w", "--top-k", "3",
        says=("--mined 100", "below 5"),
    )  # fmt: skip
