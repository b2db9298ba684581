"""Triplets: what the generator promises, the reader of JSON lines, and every bad line."""

import json
import warnings

import numpy as np
import pytest

from data.stream import DataError
from data.triplets import (
    CLS,
    PAD,
    SEP,
    Triplet,
    encode_triplets,
    key_value_documents,
    read_triplets,
    split_sentences,
    text_triplets,
)

SMALL = {"train_documents": 40, "test_documents": 10, "queries": 2, "topics": 9, "keys": 7, "values": 5}


def test_the_answer_stands_in_the_asked_sentence_and_nowhere_else_is_the_key():
    data = key_value_documents(3, **SMALL)
    words, lengths = data.info["words"], set()
    assert data.info["vocab_size"] == len(words) == 4 + 9 + 7 + 35 and data.info["stop"] == SEP
    seen = {}
    for split, count in (("train", 40), ("test", 10)):
        rows = data[split]
        assert len(rows["query"]) == 2 * count and set(rows["document_id"].tolist()) == set(range(count))
        for i in range(2 * count):
            document, owner, where = rows["document"][i], rows["sentence_ids"][i], rows["sentence"][i]
            number = owner.max() + 1
            lengths.add((split, int(number)))
            assert document[0] == CLS and document[6 * number + 1] == SEP and (document[6 * number + 2 :] == PAD).all()
            assert (rows["document_mask"][i] == (document != PAD)).all()
            assert (owner[[0, *range(6 * number + 1, len(owner))]] == -1).all()
            sentences = [document[owner == s] for s in range(number)]
            keys = [s[0] for s in sentences]
            assert len(set(keys)) == number and all(words[k].startswith("key") for k in keys)
            first, a, b, key, last = rows["query"][i]
            assert (first, last) == (CLS, SEP) and key == keys[where] and a != b
            for s in sentences:
                assert s[1:3].tolist() == [a, b] and s[5] == 3 and words[a].startswith("topic")
                assert all(words[v].startswith(f"value{words[s[0]][3:]}.") for v in s[3:5])
            assert rows["target"][i].tolist() == [*sentences[where][3:5].tolist(), SEP]
            assert seen.setdefault((int(a), int(b)), (split, int(rows["document_id"][i]))) == (
                split,
                rows["document_id"][i],
            )
    assert len(seen) == 50
    assert {n for s, n in lengths if s == "test"} == {6} and {n for s, n in lengths if s == "train"} == set(range(1, 7))
    again, other = key_value_documents(3, **SMALL), key_value_documents(4, **SMALL)
    assert again.fingerprint == data.fingerprint != other.fingerprint


def test_values_are_drawn_anew_and_queries_differ_where_they_can():
    rows = key_value_documents(0, **{**SMALL, "shortest": 6})["train"]
    targets = {tuple(t) for t in rows["target"].tolist()}
    assert len(targets) > 20
    assert (rows["sentence"][::2] != rows["sentence"][1::2]).all()


@pytest.mark.parametrize(
    "change", [{"keys": 5}, {"shortest": 0}, {"shortest": 7}, {"queries": 0}, {"values": 0}, {"test_documents": 0}]
)
def test_impossible_sizes(change):
    with pytest.raises(DataError, match="needs 1 <= shortest <= sentences <= keys"):
        key_value_documents(0, **{**SMALL, **change})


def test_too_few_topics():
    with pytest.raises(DataError, match="73 documents need as many pairs of topics; 9 topics make 72"):
        key_value_documents(0, **{**SMALL, "train_documents": 63})


# --- JSON lines -------------------------------------------------------------------------------------------------------

ROW = {"query": "who sings", "document": "The cat sings. The dog sleeps!  Is it late?", "target": "The dog"}


def file_of(tmp_path, *rows, name="rows.jsonl"):
    (tmp_path / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return tmp_path / name


def test_rows_are_read_with_their_sentences(tmp_path):
    spans = [[0, 14], [15, 30]]
    first, second = read_triplets(file_of(tmp_path, ROW, "", {**ROW, "sentence_spans": spans, "doc_id": 7}))
    assert first.spans == ((0, 14), (15, 30), (32, 43)) and first.doc_id == ROW["document"] and first.gold == 1
    assert second.spans == ((0, 14), (15, 30)) and second.doc_id == "7" and second.place.endswith("rows.jsonl, line 3")
    assert split_sentences("One 3.5 two... three") == ((0, 14), (15, 20))
    assert split_sentences(" alone ") == ((1, 7),)
    assert Triplet("q", "a b", "z", ((0, 3),), "", "").gold == -1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON \(Expecting property name"),
        ("[1]", "line 2: expected an object .*, got list"),
        ({"query": "a", "target": "b"}, "line 2: 'document' must be a text; the line has query, target"),
        ({**ROW, "target": "  "}, "line 2: 'target' is empty"),
        ({**ROW, "query": 3}, "line 2: 'query' must be a text"),
        (
            {**ROW, "sentence_spans": [[0, 5], [4, 9]]},
            r"line 2: sentence span \[4, 9\] overlaps the one before, .* at 5",
        ),
        (
            {**ROW, "sentence_spans": [[0, 44]]},
            r"line 2: sentence span \[0, 44\] lies outside the document's 43 characters",
        ),
        ({**ROW, "sentence_spans": [[-1, 4]]}, r"\[-1, 4\] lies outside"),
        ({**ROW, "sentence_spans": [[4, 4]]}, r"\[4, 4\] lies outside"),
        ({**ROW, "sentence_spans": []}, r"must be a list of \[start, end\] characters"),
        ({**ROW, "sentence_spans": [[0, True]]}, r"must be a list of \[start, end\] characters"),
        ({**ROW, "sentence_spans": "0-4"}, r"must be a list of \[start, end\] characters"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        read_triplets(file_of(tmp_path, ROW, line))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        read_triplets(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="no rows"):
        read_triplets(file_of(tmp_path, "", " "))
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8 at byte 0"):
        read_triplets(tmp_path / "bad.jsonl")
    swapped = {"query": ROW["document"], "document": "short one", "target": "one"}
    with pytest.warns(UserWarning, match="the document is shorter than the query in 2 of 3 rows; columns swapped"):
        read_triplets(file_of(tmp_path, swapped, ROW, swapped))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_triplets(file_of(tmp_path, swapped, ROW))
    with pytest.raises(DataError, match="holds one document; expected at least 2"):
        text_triplets(file_of(tmp_path, ROW, ROW))


SPECIAL = {"pad": 0, "cls": 1, "sep": 2}


def letters(text):
    """A token per word, its id 10 and its length; offsets begin with the space before, as byte-level ones do."""
    ids, offsets, at = [], [], 0
    for word in text.split():
        begin = text.index(word, at)
        ids.append(10 + len(word))
        offsets.append((max(0, begin - 1), begin + len(word)))
        at = begin + len(word)
    return ids, offsets


def triplet(target="The dog", **rest):
    document = ROW["document"]
    return Triplet(**{"query": "who sings", "document": document, "target": target, "spans": split_sentences(document),
                      "doc_id": "d", "place": "f, line 1", **rest})  # fmt: skip


def test_rows_become_padded_arrays():
    rows = [triplet(), triplet("late", query="a", doc_id="e"), triplet("nowhere", doc_id="d")]
    found = encode_triplets(rows, letters, SPECIAL)
    np.testing.assert_array_equal(found["query"], [[1, 13, 15, 2], [1, 11, 2, 0], [1, 13, 15, 2]])
    np.testing.assert_array_equal(found["query_mask"][1], [True, True, True, False])
    np.testing.assert_array_equal(found["document"][0], [1, 13, 13, 16, 13, 13, 17, 12, 12, 15, 2])
    np.testing.assert_array_equal(found["sentence_ids"][0], [-1, 0, 0, 0, 1, 1, 1, 2, 2, 2, -1])
    np.testing.assert_array_equal(found["target"], [[13, 13, 2], [14, 2, 0], [17, 2, 0]])
    np.testing.assert_array_equal(found["document_id"], [0, 1, 0])
    np.testing.assert_array_equal(found["sentence"], [1, 2, -1])


def test_texts_are_cut_and_what_is_lost_is_said():
    rows = [triplet(), triplet("late"), triplet("The cat")]
    with pytest.warns(UserWarning, match="the target sentence lies beyond the 8 tokens of a document in 33 % of rows"):
        found = encode_triplets(rows, letters, SPECIAL, query_length=3, document_length=8)
    assert found["document"].shape == (3, 8) and found["query"].tolist()[0] == [1, 13, 2]
    np.testing.assert_array_equal(found["sentence"], [1, -1, 0])
    found = encode_triplets(rows, letters, SPECIAL, sentences=2)
    np.testing.assert_array_equal(found["sentence"], [1, -1, 0])
    assert found["sentence_ids"].max() == 1
    with pytest.raises(DataError, match="f, line 1: the target has 2 tokens, the decoder takes 1; shorten it"):
        encode_triplets(rows, letters, SPECIAL, target_length=2)
    for name in SPECIAL:
        with pytest.raises(DataError, match=f"the tokenizer has no {name} token"):
            encode_triplets(rows, letters, {**SPECIAL, name: None})


def test_a_folder_and_a_single_file(tmp_path):
    rows = [{**ROW, "doc_id": f"d{i // 2}", "query": f"question {i}"} for i in range(40)]
    folder = text_triplets(file_of(tmp_path, *rows[:30], name="train.jsonl").parent if file_of(
        tmp_path, *rows[30:], name="test.jsonl") else None, 200)  # fmt: skip
    assert len(folder["train"]["query"]) == 30 and len(folder["test"]["query"]) == 10
    assert folder["test"]["sentence"].tolist() == [1] * 10 and folder.info["sentences"] == 3
    words = np.array(folder.info["words"])
    assert words[folder["test"]["target"][0]].tolist() == ["the", "dog", "[SEP]"]
    assert folder["train"]["document_id"].max() == 14
    single = text_triplets(file_of(tmp_path, *rows, name="all.jsonl"), 200)
    assert len(single["test"]["query"]) == 4 and len(single["train"]["query"]) == 36
    own = {tuple(r) for r in single["test"]["query"].tolist()} & {tuple(r) for r in single["train"]["query"].tolist()}
    assert not own
