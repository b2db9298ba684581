"""Bad input: exit 2, one clear line on standard error, no traceback, and nothing on disk is changed."""

import errno
import json
import re

import numpy as np
import pytest
from command import ROOT, TINY, contents, refused, start, zoo

HEADER = "@problemName toy\n@timeStamps false\n@univariate true\n@equalLength true\n@classLabel true a b\n@data\n"
GOOD = "".join(f"{','.join(f'{v:.3f}' for v in np.sin(np.arange(8) + i))}:{'ab'[i % 2]}\n" for i in range(12))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run."""
    run = tmp_path_factory.mktemp("runs") / "w"
    assert zoo("train", *TINY, "--workdir", run) == 0
    return run


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, which must stay as it was."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def untouched(capsys, folder, *argv, says):
    """The refusal, after checking that nothing below ``folder`` changed."""
    before = contents(folder)
    line = refused(capsys, *argv, says=says)
    assert contents(folder) == before
    return line


# ------------------------------------------------------------------------------- unknown methods, options, values


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("lst",), ("'lst'", "list")),
        (("frobnicate",), ("known: list, show, train",)),
        (("list", "--familly", "mri"), ("'--familly'", "--family")),
        (("list", "--family", "continuall"), ("'continuall'", "did you mean continual")),
        (("list", "--family"), ("--family needs a value",)),
        (("list", "--family", "--json"), ("--family needs a value",)),
        (("list", "--json=yes"), ("--json takes no value",)),
        (("list", "extra"), ("usage: zoo list",)),
        (("show",), ("usage: zoo show NAME",)),
        (("show", "tean"), ("unknown method 'tean'", "teen")),
        (("show", "teen", "--jsn"), ("'--jsn'", "--json")),
        (("train",), ("name first", "zoo list")),
        (("train", "--epochs", "1"), ("name first",)),
        (("train", "dbmp"), ("unknown method 'dbmp'", "did you mean dbpm")),
        (("train", "teen", "--epohcs", "1"), ("'--epohcs'", "did you mean --epochs?")),
        (("train", "teen", "--optimizer.learning-rat", "1"), ("did you mean --optimizer.learning-rate",)),
        (("train", "teen", "--zzz"), ("'--zzz'", "--help")),
        (("train", "teen", "stray"), ("unexpected argument 'stray'",)),
        (("train", "teen", "--epochs", "many"), ("--epochs needs a whole number", "'many'")),
        (("train", "teen", "--epochs", "1.5"), ("--epochs needs a whole number", "'1.5'")),
        (("train", "teen", "--tau", "hot"), ("--tau needs a number", "'hot'")),
        (("train", "teen", "--epochs"), ("--epochs needs a value",)),
        (("train", "teen", "--mode", "xla"), ("--mode 'xla'", "jit, pmap")),
        (("train", "teen", "--optimizer.name", "adamm"), ("'adamm'", "adamw")),
        (("train", "teen", "--seed", "-1"), ("--seed", "-1")),
        (("train", "teen", "--keep", "0"), ("--keep must be at least 1",)),
        (("train", "teen", "--save-every", "-1"), ("--save-every must not be negative",)),
        (("train", "teen", "--epochs", "0"), ("--epochs 0", "at least 1")),
        (("train", "teen", "--base", "10"), ("--base 10", "choose at most 8")),
        (("train", "teen", "--shift-weight", "2"), ("--shift-weight",)),
        (("train", "teen", "--batch-size", "0"), ("batch_size must be at least 1, got 0",)),
        (("train", "teen", "--optimizer.learning-rate", "0"), ("--optimizer.learning-rate must be positive",)),
        (("train", "teen", "--optimizer.learning-rate", "nan"), ("--optimizer.learning-rate must be positive",)),
        (("train", "teen", "--optimizer.clip-norm", "-1"), ("--optimizer.clip-norm must not be negative",)),
        (("train", "teen", "--optimizer.name", "adam"), ("--optimizer.weight-decay does nothing for adam",)),
        (("train", "teen", "--init.only", "a/*"), ("--init.only", "--init RUN")),
        (("train", "teen", "--init", "nowhere"), ("--init nowhere", "no such folder")),
        (("train", "teen", "--init", ".", "--init.rename", "ab"), ("--init.rename ab", "OLD=NEW")),
        (("train", "dbpm", "--data.name", "digit"), ("'digit'", "digits")),
        (("train", "dbpm", "--steps", "0"), ("--steps", "0")),
        (("eval",), ("usage: zoo eval D",)),
        (("eval", "nowhere"), ("nowhere", "no such folder")),
        (("eval", "."), ("run.json", "model.json")),
        (("claim", "teem"), ("unknown method 'teem'", "teen")),
        (("claim", "teen", "--seeds", "0"), ("--seeds needs a whole number of at least 1", "'0'")),
        (("claim", "teen", "--seeds", "two"), ("--seeds", "'two'")),
        (("bench", "tene"), ("unknown method 'tene'", "teen")),
        (("bench",), ("usage: zoo bench",)),
        (("new",), ("usage: zoo new",)),
        (("new", "comet"), ("--family F", "continual")),
        (("new", "comet", "--family", "visio"), ("'visio'", "vision")),
        (("new", "Comet", "--family", "vision"), ("'Comet'", "lower-case")),
        (("new", "class", "--family", "vision"), ("'class' cannot be",)),
        (("new", "teen", "--family", "vision"), ("method named 'teen' already",)),
        (("new", "comet", "--family", "vision"), ("not a checkout of the zoo", "--root")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_words_get_one_line_with_the_right_ones(here, capsys, argv, says):
    untouched(capsys, here, *argv, says=says)


def test_new_writes_nothing_if_one_file_is_there(here, capsys):
    (here / "zoo").mkdir()
    (here / "zoo" / "base.py").write_text("")
    taken = here / "tests" / "zoo" / "vision" / "test_comet.py"
    taken.parent.mkdir(parents=True)
    taken.write_text("mine")
    untouched(capsys, here, "new", "comet", "--family", "vision", says=("test_comet.py exists already",))


# ------------------------------------------------------------------------------------------------------------ data


def ucr(folder, train=HEADER + GOOD, test=HEADER + GOOD):
    (folder / "toy_TRAIN.ts").write_text(train)
    if test is not None:
        (folder / "toy_TEST.ts").write_text(test)
    return ("train", "dbpm", "--data.name", "ucr", "--data.path", folder, "--max-segments", "2")


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (HEADER + GOOD + "1,2,3,4,5,6,7,x:a\n", ("toy_TRAIN.ts:19", "'x'", "expected a finite number")),
        (HEADER + GOOD + "1,2,3,4,5,6,7,NaN:a\n", ("toy_TRAIN.ts:19", "value 8", "missing value")),
        (HEADER + GOOD + "1,2,3,4,5,6,7,inf:a\n", ("toy_TRAIN.ts:19", "value 8", "finite")),
        (HEADER + GOOD + "1,2,3:a\n", ("toy_TRAIN.ts:19", "3 steps", "expected 8")),
        (HEADER + GOOD + "1,2,3,4,5,6,7,8:c\n", ("toy_TRAIN.ts:19", "unknown class 'c'", "expected one of a, b")),
        (HEADER + GOOD + "1,2,3,4,5,6,7,8\n", ("toy_TRAIN.ts:19", "no ':'")),
        (HEADER, ("toy_TRAIN.ts:6", "no series")),
        ("1,2,3:a\n", ("toy_TRAIN.ts:1", "@data")),
        (HEADER.replace("true a b", "false") + GOOD, ("toy_TRAIN.ts:5", "@classLabel")),
    ],
    ids=["word", "nan", "inf", "short", "class", "colon", "empty", "header", "labels"],
)
def test_malformed_series_name_file_line_and_expectation(here, capsys, train, says):
    untouched(capsys, here, *ucr(here, train), says=says)


def test_missing_series_are_named(here, capsys):
    untouched(capsys, here, "train", "dbpm", "--data.name", "ucr", says=("--data.path DIR",))
    untouched(
        capsys, here, "train", "dbpm", "--data.name", "ucr", "--data.path", "gone", says=("gone", "no such folder")
    )
    untouched(capsys, here, *ucr(here, test=None), says=("toy_TEST.ts", "No such file"))
    untouched(capsys, here, *ucr(here), "--data.split", "toi", says=("'toi'", "toy"))


def images(folder, **changes):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.uniform(0, 1, (40, 4, 4)).astype(np.float32), "label": np.arange(40) % 10}
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    np.savez(folder / "mine.npz", **{k: v for k, v in arrays.items() if v is not None})
    return ("train", *TINY, "--data.path", "mine.npz")


def _with(value, at):
    def change(array):
        array = array.copy()
        array[at] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": _with(np.nan, (3, 0, 0))}, ("mine.npz", "image 3", "not finite")),
        ({"x": _with(900.0, (3, 0, 0))}, ("mine.npz", "[0, 255]", "900")),
        ({"x": lambda x: x[:, 0, 0]}, ("mine.npz", "expected images", "(40,)")),
        ({"label": _with(-1, 7)}, ("mine.npz", "label 7 is negative")),
        ({"label": lambda y: y + 0.5}, ("mine.npz", "one integer per image", "float64")),
        ({"label": lambda y: y[:-1]}, ("mine.npz", "one integer per image", "[40]")),
        ({"label": _with(10**6, 7)}, ("mine.npz", "class 10 ")),
        ({"x": lambda x: None}, ("mine.npz", "'x' or 'image'")),
        ({"label": lambda x: None}, ("mine.npz", "label")),
    ],
    ids=["nan", "range", "rank", "negative", "float", "length", "huge", "no x", "no label"],
)
def test_malformed_images_name_file_place_and_expectation(here, capsys, changes, says):
    untouched(capsys, here, *images(here, **changes), says=says)


def test_missing_and_broken_image_files(here, capsys):
    untouched(capsys, here, "train", *TINY, "--data.path", "gone.npz", says=("gone.npz", "no such file"))
    (here / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    untouched(capsys, here, "train", *TINY, "--data.path", "torn.npz", says=("torn.npz", "not a readable .npz"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("user,item\n1,2\n1\n", ("pairs.csv", "3")),
        ("", ("pairs.csv",)),
    ],
    ids=["column", "empty"],
)
def test_malformed_interactions_name_file_and_line(here, capsys, text, says):
    (here / "pairs.csv").write_text(text)
    untouched(capsys, here, "train", "dsl", "--data.path", "pairs.csv", says=says)


def test_missing_interactions(here, capsys):
    untouched(capsys, here, "train", "dsl", "--data.path", "gone.csv", says=("gone.csv",))


def test_an_unknown_tfds_name_is_one_line(here, capsys):
    untouched(capsys, here, "train", *TINY, "--data.name", "digts", says=("'digts'",))


# --------------------------------------------------------------------------------------------------------- devices


def test_more_devices_than_there_are(here, capsys):
    command = ("train", *TINY, "--devices", "99", "--workdir", "a/b/c")
    untouched(capsys, here, *command, says=("--devices 99", "there are 8"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--devices", "8", "--fsdp", "3"), ("--fsdp 3", "8 devices")),
        (("--mode", "pmap", "--devices", "8", "--fsdp", "2"), ("--mode pmap", "--mode jit")),
        (("--devices", "8", "--batch-size", "60"), ("--batch-size 60", "8 devices")),
    ],
)
def test_devices_that_do_not_divide(here, capsys, options, says):
    untouched(capsys, here, "train", "teen", "--epochs", "1", "--no-progress", *options, says=says)


def test_a_refused_start_does_not_bind_the_folder(here, capsys):
    refused(capsys, "train", "teen", "--epochs", "1", "--no-progress", "--devices", "8", "--batch-size", "60")
    refused(capsys, "train", "teen", "--epochs", "0", "--no-progress")
    assert not contents(here)


def test_a_platform_that_is_not_here(tmp_path):
    process = start("train", "teen", "--platform", "tpu", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and not out
    assert err.startswith("zoo: --platform tpu") and err.count("\n") == 1, err
    assert not contents(tmp_path)


# --------------------------------------------------------------------------------------------------------- folders


def test_a_run_of_another_recipe_names_the_setting(trained, capsys):
    for option, says in (
        (("--tau", "3"), "tau was 16.0, now 3.0"),
        (("--data.name", "mixture"), "data.name was 'digits'"),
    ):
        untouched(
            capsys, trained, "train", *TINY, "--workdir", trained, *option, says=(str(trained), says, "--workdir")
        )
    line = untouched(capsys, trained, "train", "dbpm", "--workdir", trained, says=("method was 'teen', now 'dbpm'",))
    assert str(trained) in line


def test_a_run_whose_data_changed(here, capsys, trained):
    import shutil

    shutil.copytree(trained, "w")
    found = json.loads((here / "w" / "run.json").read_text())
    (here / "w" / "run.json").write_text(json.dumps({**found, "data": "other", "complete": False}))
    untouched(capsys, here, "train", *TINY, "--workdir", "w", says=("w was trained on other data", "other"))
    (here / "w" / "run.json").write_text(json.dumps({**found, "data": "other"}))
    untouched(capsys, here, "eval", "w", says=("w was trained on other data", "other"))


@pytest.mark.parametrize("text", ["{", "[]", '{"method": "teen"}', "null", ""])
def test_a_run_file_that_cannot_be_read(here, capsys, text):
    (here / "run.json").write_text(text)
    untouched(capsys, here, "train", *TINY, "--workdir", ".", says=("run.json cannot be read",))
    untouched(capsys, here, "eval", ".", says=("run.json cannot be read",))


def test_leftovers_without_a_run_file_are_not_overwritten(here, capsys):
    (here / "checkpoints").mkdir()
    untouched(capsys, here, "train", *TINY, "--workdir", ".", says=("no run.json", "--workdir"))


def test_a_workdir_that_is_a_file_or_below_one(here, capsys):
    (here / "file").write_text("mine")
    untouched(capsys, here, "train", *TINY, "--workdir", "file", says=("--workdir file is a file",))
    untouched(capsys, here, "train", *TINY, "--workdir", "file/w", says=("--workdir file/w cannot be written",))
    refused(capsys, "train", *TINY, "--workdir", "/proc/zoo/w", says=("--workdir /proc/zoo/w cannot be written",))
    untouched(capsys, here, "claim", "teen", "--output", "file/w", says=("--output file/w cannot be written",))


def test_a_read_only_workdir(here, capsys, monkeypatch):
    from pathlib import Path

    (here / "w").mkdir()

    def read_only(self, *_):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "write_bytes", read_only)
    command = ("train", *TINY, "--workdir", "w")
    untouched(capsys, here, *command, says=("--workdir w cannot be written: Read-only file system",))
    untouched(capsys, here, *command[:-1], "new/w", says=("--workdir new/w cannot be written",))


def test_a_disk_that_is_full_while_logging(here, capsys, monkeypatch):
    from trainers.record import FileRecord

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileRecord, "log", full)
    untouched(capsys, here, "train", *TINY, "--workdir", "w", says=("w: No space left on device",))


def test_a_disk_that_is_full_while_saving(here, capsys, monkeypatch):
    from checkpoints import store

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_text", full)
    line = untouched(capsys, here, "train", *TINY, "--workdir", "w", says=("No space left on device",))
    assert "checkpoint" in line


def test_a_disk_that_is_full_while_exporting_keeps_the_run(here, capsys, monkeypatch):
    from checkpoints import model_folder

    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(model_folder, "write_arrays", full)
        refused(capsys, "train", *TINY, "--workdir", "w", says=("cannot write the model", "No space left on device"))
    assert not json.loads((here / "w" / "run.json").read_text())["complete"]
    refused(capsys, "eval", "w", says=("not complete", "zoo train teen --workdir w"))
    assert zoo("train", *TINY, "--workdir", "w") == 0
    assert json.loads((here / "w" / "run.json").read_text())["complete"]


def test_a_checkpoint_that_does_not_fit_names_path_and_shapes(here, capsys, trained):
    import shutil

    shutil.copytree(trained, "w")
    found = json.loads((here / "w" / "run.json").read_text())
    (here / "w" / "run.json").write_text(json.dumps({**found, "complete": False}))
    for file in (here / "w" / "checkpoints").glob("*.json"):
        manifest = json.loads(file.read_text())
        path = next(p for p in manifest["leaves"] if p.startswith("optimizer/") and p.endswith("kernel"))
        shape = manifest["leaves"][path]["shape"]
        manifest["leaves"][path]["shape"] = [shape[0] + 1, *shape[1:]]
        file.write_text(json.dumps(manifest))
    line = untouched(capsys, here, "train", *TINY, "--workdir", "w", says=("does not fit", path))
    there, ours = re.search(r"float32\[(.*?)\] there and float32\[(.*?)\] here", line).groups()
    assert there == ", ".join(map(str, [shape[0] + 1, *shape[1:]])) and ours == ", ".join(map(str, shape))


def test_init_that_does_not_fit_names_path_and_shapes(here, capsys, trained):
    command = ("train", *TINY, "--features", "32", "--init", trained)
    line = untouched(
        capsys, here, *command, "--init.only", "features/out/kernel", says=("nothing fits", "there and", "here")
    )
    assert re.search(r"kernel is float32\[\d+, \d+\] there and float32\[\d+, \d+\] here", line)
    untouched(
        capsys, here, *command, "--init.only", "featurs/*", says=("'featurs/*' matches no parameter", "features/")
    )
    (here / "empty").mkdir()
    untouched(capsys, here, "train", *TINY, "--init", "empty", says=("empty", "no weights"))


def test_a_damaged_model_is_not_evaluated(here, capsys, trained):
    import shutil

    shutil.copytree(trained / "model", "model")
    (here / "model" / "model.json").write_text("{")
    untouched(capsys, here, "eval", "model", says=("model.json", "unreadable"))


def test_eval_of_a_run_of_another_version(here, capsys, trained):
    import shutil

    shutil.copytree(trained, "w")
    found = json.loads((here / "w" / "run.json").read_text())
    found["recipe"]["optimizer"]["momentous"] = 3
    (here / "w" / "run.json").write_text(json.dumps(found))
    untouched(capsys, here, "eval", "w", says=("'momentous'", "another version"))


# ------------------------------------------------------------------------------------ whose error is it, after all


def test_errors_of_our_own_keep_their_traceback(monkeypatch):
    import trainers.run

    def slip(*_):
        return int("not a number")  # a slip, not a refusal

    monkeypatch.setattr(trainers.run, "recipe_module", slip)
    with pytest.raises(ValueError, match="invalid literal"):
        zoo("train", *TINY)


def test_errors_raised_by_the_zoo_while_building_are_one_line(here, capsys, monkeypatch):
    from data.dataset import Dataset
    from trainers.recipes.continual.teen import Recipe
    from zoo.continual import teen

    monkeypatch.setattr(Recipe, "build", lambda self: teen.calibrate_prototypes(np.zeros((2, 3)), np.zeros((2, 4))))
    monkeypatch.setattr(Recipe, "build", lambda self: Dataset("toy", {"train": {}})["test"])
    untouched(capsys, here, "train", *TINY, says=("data set 'toy' has no split 'test'; it has train",))
    monkeypatch.setattr(Recipe, "build", lambda self: teen.check_shift_weight(2.0))
    untouched(capsys, here, "train", *TINY, says=("2.0",))


def test_zoo_traceback_shows_the_whole_story(here, monkeypatch):
    from trainers.errors import UserError

    monkeypatch.setenv("ZOO_TRACEBACK", "1")
    with pytest.raises(UserError):
        zoo("eval", "nowhere")


def test_a_run_that_diverges_says_where_and_keeps_its_folder(here, capsys):
    line = refused(capsys, "train", *TINY, "--optimizer.learning-rate", "1e38", "--workdir", "w")
    assert "is not finite at step" in line and "phase 'base'" in line
    assert list((here / "w").glob("fault-*.npz"))


def test_root_is_the_repository():
    assert (ROOT / "zoo" / "base.py").exists()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("--lerning-rate", "--optimizer.learning-rate"), ("--stpes", "--steps"), ("--pth", "--data.path")],
)
def test_options_are_found_by_their_last_part(wrong, right):
    from trainers.cli import nearest_options
    from trainers.options import RunOptions, option_names
    from trainers.recipes.diffusion.ict import Recipe

    assert right in nearest_options(wrong, [*option_names(Recipe()), *option_names(RunOptions())])
