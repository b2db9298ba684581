"""Text collections: every layout, what is refused and how, and that nothing is lost or renumbered wrongly."""

import json

import numpy as np
import pytest

from data.collections import Judgements, read_collection
from data.stream import DataError


def write(folder, **files):
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_tsv", ".tsv").replace("_jsonl", ".jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def beir(folder, qrels="query-id\tcorpus-id\tscore\nq2\td9\t2\nq1\td3\t1\nq1\td9\t0\n", **more):
    rows = [{"_id": "d9", "title": "wings", "text": "of birds"}, {"_id": "d3", "text": "heat  flow"}]
    asked = [{"_id": "q1", "text": "how hot"}, {"_id": "q2", "text": "how high"}, {"_id": "q3", "text": "why"}]
    return write(
        folder,
        corpus_jsonl="".join(json.dumps(r) + "\n" for r in rows),
        queries_jsonl="".join(json.dumps(r) + "\n" for r in asked),
        qrels__test_tsv=qrels,
        **more,
    )


def test_beir(tmp_path):
    found = read_collection(beir(tmp_path, qrels__train_tsv="q3\td3\t1\n"))
    assert found.documents == ["wings of birds", "heat  flow"] and found.titles == ["wings", ""]
    assert found.document_ids == ["d9", "d3"] and found.queries == ["how hot", "how high", "why"]
    rows = {(int(q), int(d)): float(g) for q, d, g in zip(*vars(found.judgements).values(), strict=True)}
    assert rows == {(1, 0): 2.0, (0, 1): 1.0, (2, 1): 1.0}  # a grade of 0 is no judgement
    assert found.splits["test"].tolist() == [0, 1] and found.splits["train"].tolist() == [2]
    again = read_collection(tmp_path)
    assert again.fingerprint == found.fingerprint
    (tmp_path / "qrels" / "train.tsv").write_text("q3\td9\t1\n")
    assert read_collection(tmp_path).fingerprint != found.fingerprint


def test_msmarco_passages_and_documents(tmp_path):
    write(
        tmp_path,
        collection_tsv="7\tabout wings\n3\tabout heat\n",
        **{"queries.train_tsv": "1\thot\n2\thigh\n", "queries.dev_tsv": "5\tlow\n"},
        **{"qrels.train_tsv": "1\t0\t3\t1\n2 0 7 1\n", "qrels.dev_tsv": "5\t0\t7\t1\n"},
    )
    found = read_collection(tmp_path)
    assert found.texts == ["about wings", "about heat"] and found.query_ids == ["5", "1", "2"]
    assert {k: v.tolist() for k, v in found.splits.items()} == {"test": [0], "train": [1, 2]}
    assert found.judgements.document.tolist() == [0, 1, 0]
    (tmp_path / "collection.tsv").write_text("7\thttp://a\tA title\tits body\n3\thttp://b\t\tbody\n")
    found = read_collection(tmp_path)
    assert found.titles == ["A title", ""] and found.documents == ["A title its body", "body"]


CRAN = ".I 1\n.T\nwing flow\n.A\nsomebody\n.W\nwing flow\nat high speed .\n.I 2\n.T\n.W\nheat\n"


def test_cranfield(tmp_path):
    write(
        tmp_path,
        **{"cran.all.1400": CRAN, "cran.qry": ".I 004\n.W\nwhat\nwing\n.I 009\n.W\nheat .\n.I 010\n.W\nthird\n"},
        cranqrel="1 1 2\n2 2 1\n3 2 4\n1 2 -1\n2 1 5\n",
    )
    found = read_collection(tmp_path)
    assert found.titles == ["wing flow", ""] and found.texts == ["at high speed .", "heat"]  # the title once
    assert found.queries == ["what wing", "heat .", "third"]
    # queries count in order of appearance; code 1 is the best, codes outside 1 .. 4 are no judgement
    assert found.judgements.query.tolist() == [0, 1, 2] and found.judgements.document.tolist() == [0, 1, 1]
    assert found.judgements.grade.tolist() == [3, 4, 1]
    assert found.splits["train"].tolist() == [0, 1] and found.splits["test"].tolist() == [2]  # every third


def test_padded_judgements():
    j = Judgements(np.array([0, 0, 2]), np.array([5, 6, 7]), np.array([1.0, 3.0, 2.0], np.float32))
    ids, grades = j.padded([2, 0, 1])
    assert ids.tolist() == [[7, -1], [5, 6], [-1, -1]] and grades.tolist() == [[2, 0], [1, 3], [0, 0]]
    assert j.padded([0], least=2)[0].tolist() == [[6]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"qrels": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t1\n"},
            "2 judged documents are not in corpus.jsonl: d1, d2",
        ),
        ({"qrels": "q9\td3\t1\n"}, "1 judged queries are not in queries.jsonl: q9"),
        ({"qrels": "q1\td3\n"}, "test.tsv, line 1: expected query-id, corpus-id and score"),
        ({"qrels": "q1\td3\tmuch\n"}, "test.tsv, line 1: expected query-id, corpus-id and score"),
        ({"qrels": "q1\td3\t0\n"}, "no judgement has a grade above 0"),
        ({"qrels__train_tsv": "q1\td9\t1\n"}, "query 'q1' has judgements in"),
        ({"corpus_jsonl": '{"_id": 1}\n'}, "corpus.jsonl, line 1: expected a JSON object"),
        ({"corpus_jsonl": "[]\n"}, "corpus.jsonl, line 1: expected a JSON object"),
        ({"corpus_jsonl": ""}, "corpus.jsonl: holds no documents"),
        (
            {"queries_jsonl": '{"_id": "a", "text": ""}\n{"_id": "a", "text": ""}\n'},
            "queries.jsonl: id 'a' occurs twice",
        ),
    ],
)
def test_bad_beir_files_are_named(tmp_path, change, says):
    beir(tmp_path, **({"qrels": change["qrels"]} if "qrels" in change else {}))
    write(tmp_path, **{k: v for k, v in change.items() if k != "qrels"})
    with pytest.raises(DataError, match="(?s).*".join(says.split("…"))) as error:
        read_collection(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_folders_and_other_files(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        read_collection(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"neither corpus.jsonl \(BEIR\), collection.tsv"):
        read_collection(tmp_path)
    write(tmp_path, collection_tsv="7 about wings\n")
    with pytest.raises(DataError, match="collection.tsv, line 1: expected `pid text` or .* got 1 columns"):
        read_collection(tmp_path)
    write(tmp_path, collection_tsv="7\twings\n")
    with pytest.raises(DataError, match="expected queries.tsv or queries.train.tsv"):
        read_collection(tmp_path)
    write(tmp_path, queries_tsv="1 hot\n", qrels_tsv="1 0 7\n")
    with pytest.raises(DataError, match="queries.tsv, line 1: expected `qid text`"):
        read_collection(tmp_path)
    write(tmp_path, queries_tsv="1\thot\n")
    with pytest.raises(DataError, match="qrels.tsv, line 1: expected `qid 0 pid grade`; got '1 0 7'"):
        read_collection(tmp_path)
    (tmp_path / "queries.tsv").write_bytes(b"1\t\xff\xfe\n")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        read_collection(tmp_path)
    other = tmp_path / "cran"
    other.mkdir()
    write(other, **{"cran.all.1400": "text\n", "cran.qry": "", "cranqrel": ""})
    with pytest.raises(DataError, match="line 1: expected a record that begins with `.I number`"):
        read_collection(other)
