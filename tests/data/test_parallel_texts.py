"""Labelled texts: translations say the same word by word, csv files are read with their columns or refused by line."""

import numpy as np
import pytest

from data.parallel_texts import read_labelled_texts, translated_documents
from data.stream import DataError


def test_translations_are_word_by_word_and_share_no_word():
    data = translated_documents(3, documents=600, topics=4, concepts=26, synonyms=2, length=10, focus=0.7)
    north, south = ([t.split() for t in data.texts[name]] for name in ("north", "south"))
    pairs = {(a, b) for x, y in zip(north, south, strict=True) for a, b in zip(x, y, strict=True)}
    words = [{a for a, _ in pairs}, {b for _, b in pairs}]
    # one translation each way, every concept's synonyms, no word in both
    assert len(pairs) == len(words[0]) == len(words[1]) == 52 and not words[0] & words[1]
    assert {len(x) for x in north} == {10} and (np.bincount(data.labels) == 150).all()
    assert data.train.sum() == 420 and data.classes == ("topic 0", "topic 1", "topic 2", "topic 3")
    # a topic has six concepts (twelve words) of its own, which no other topic prefers: 0.7 + 0.3 * 6 / 26
    counts = {w: np.zeros(4) for w in words[0]}
    for x, label in zip(north, data.labels, strict=True):
        for w in x:
            counts[w][label] += 1
    table = np.array(list(counts.values()))
    for topic in range(4):
        own = np.sort(table[:, topic])[-12:].sum() / table[:, topic].sum()
        assert own == pytest.approx(0.7 + 0.3 * 6 / 26, abs=0.04)
    assert len({int(i) for t in range(4) for i in np.argsort(table[:, t])[-12:]}) == 48
    again = translated_documents(3, 600, 4, 26, 2, 10, 0.7)
    assert again.fingerprint == data.fingerprint != translated_documents(4, 600, 4, 26, 2, 10, 0.7).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topics": 1}, "need two topics"),
        ({"concepts": 3}, "as many concepts"),
        ({"length": 0}, "positive sizes"),
        ({"languages": ()}, "0 languages"),
        ({"focus": 1.2}, r"focus must be in \[0, 1\]"),
        ({"test_share": 1.0}, r"test_share in \(0, 1\)"),
    ],
)
def test_impossible_documents_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        translated_documents(**change)


def write(path, text):
    file = path / "mine.csv"
    file.write_text(text)
    return file


def test_a_csv_is_read_with_its_classes_and_splits(tmp_path):
    rows = 'text_en,label,text_fr,split\n"red, cat",b,chat,train\ndog,a,chien,test\nno,b,non,val\nyes,a,oui,train\n'
    data = read_labelled_texts(write(tmp_path, rows))
    assert dict(data.texts) == {"en": ("red, cat", "dog", "yes"), "fr": ("chat", "chien", "oui")}
    assert data.classes == ("a", "b") and data.labels.tolist() == [1, 0, 0] and data.labels.dtype == np.int32
    assert data.train.tolist() == [True, False, True]
    rows = "text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20))
    data = read_labelled_texts(write(tmp_path, rows))
    assert list(data.texts) == ["text"] and len(data.texts["text"]) == 20 and data.train.sum() == 16


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("text,class\na,b\n", "mine.csv: has no column 'label'; it has text, class"),
        ("words,label\na,b\n", "mine.csv: has no column 'text'; it has words, label"),
        ("text,label\na,x\n,y\n", "mine.csv, line 3: the cell of column 'text' is empty or null"),
        ("text,label\na,x\nb,\n", "mine.csv, line 3: the cell of column 'label' is empty or null"),
        ("text,label,split\na,x,train\nb,x,test\n", "every row has the label 'x'"),
        ("text,label\na,x\nb,y\n", "at least 5 are needed"),
        ("text,label,split\na,x,train\nb,y,later\n", "line 3: split is 'later'"),
        ("text,label,split\na,x,train\nb,y,test\n", "no training document has the label 'y'"),
    ],
)
def test_malformed_csvs_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_labelled_texts(write(tmp_path, rows))


def test_a_missing_csv_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file; expected a csv with columns text, label"):
        read_labelled_texts(tmp_path / "none.csv")
