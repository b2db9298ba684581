"""Runs in memory, and the small functions that decide what a folder may be used for."""

import dataclasses
import json

import numpy as np
import pytest
import toy

from trainers.errors import UserError
from trainers.run import first_difference, make_writable, read_run, train_in_memory, write_json


@pytest.fixture(scope="module")
def result():
    run = toy.loop(steps=6).run
    return train_in_memory(dataclasses.replace(run, phases=run.phases[:2]), steps_per_call=3)


def test_a_run_in_memory_returns_what_it_learned(result):
    assert result.state is not None and "directions" in result.artefacts
    assert result.metrics["warm/loss"] == result.curve("loss")[1][-1]
    steps, losses = result.curve("loss")
    assert steps == list(range(1, 7)) and np.isfinite(losses).all()
    assert result.chosen["params"].keys() == result.variables["params"].keys() == {"body", "head"}
    assert isinstance(result.variables["params"]["body"]["kernel"], np.ndarray)


def test_a_run_in_memory_writes_and_prints_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = toy.loop(steps=6).run
    train_in_memory(dataclasses.replace(run, phases=run.phases[:1]), steps_per_call=3)
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_the_seed_and_only_the_seed_decides(result):
    run = toy.loop(steps=6).run
    run = dataclasses.replace(run, phases=run.phases[:2])
    again, other = train_in_memory(run, steps_per_call=3), train_in_memory(run, steps_per_call=3, seed=1)
    assert again.history == result.history and other.history != result.history


def test_a_curve_of_an_unknown_metric_names_the_nearest(result):
    with pytest.raises(ValueError, match="no metric 'lss' was logged; did you mean loss"):
        result.curve("lss")


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}, None),
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, "b.c was 2, now 3"),
        ({"a": 1}, {"a": 1, "d": 4}, "d was None, now 4"),
        ({"a": 1, "d": 4}, {"a": 2}, "a was 1, now 2"),
        ({"a": {"b": 1}}, {"a": None}, "a was {'b': 1}, now None"),
    ],
)
def test_the_first_difference_in_words(was, now, said):
    assert first_difference(was, now) == said


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    loop = {}
    loop["loop"] = loop
    with pytest.raises(ValueError, match="Circular"):
        write_json(file, loop)
    assert json.loads(file.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_folders_made_are_named_outermost_first(tmp_path):
    (tmp_path / "a").mkdir()
    made = make_writable(tmp_path / "a" / "b" / "c", "--workdir")
    assert made == [tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"]
    assert make_writable(tmp_path / "a" / "b" / "c", "--workdir") == []
    assert not list((tmp_path / "a" / "b" / "c").iterdir())


def test_a_run_file_lacking_something_is_refused(tmp_path):
    write_json(tmp_path / "run.json", {"method": "x", "hash": "y", "recipe": {}})
    with pytest.raises(UserError, match="cannot be read as a run"):
        read_run(tmp_path)
