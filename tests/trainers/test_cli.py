"""The ``zoo`` command as a user and as a program meet it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command import ROOT, TINY, contents, start, zoo

import zoo as zoo_package

NAMES = [c.name for c in zoo_package.cards()]
COMMANDS = ("list", "show", "train", "eval", "claim", "bench", "new")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run at a relative path, as the default is: the folder it was started in."""
    home = tmp_path_factory.mktemp("home")
    before = os.getcwd()
    os.chdir(home)
    try:
        assert zoo("train", *TINY) == 0
    finally:
        os.chdir(before)
    return home


def out_of(capsys, *argv):
    capsys.readouterr()
    assert zoo(*argv) == 0
    return capsys.readouterr()


# ------------------------------------------------------------------------------------------------- list and show


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_command(capsys, argv):
    out, err = out_of(capsys, *argv)
    assert not err
    for command in COMMANDS:
        assert f"  zoo {command} " in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    out, err = out_of(capsys, command, "--help")
    assert out.startswith(f"usage: zoo {command} ") and not err


def test_version(capsys):
    assert out_of(capsys, "--version").out == f"{zoo_package.__version__}\n"


def test_list_is_a_line_a_method(capsys):
    lines = out_of(capsys, "list").out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    for line, card in zip(lines, zoo_package.cards(), strict=True):
        for part in (card.family, str(card.year), card.kind, card.title):
            assert part in line


def test_list_as_json_has_the_fields_of_the_contract(capsys):
    out, err = out_of(capsys, "list", "--json")
    rows = json.loads(out)
    assert not err and [r["name"] for r in rows] == NAMES
    for row, card in zip(rows, zoo_package.cards(), strict=True):
        assert set(row) == {"name", "family", "title", "year", "kind", "plugs_into", "claim"}
        assert row["plugs_into"] == list(card.plugs_into)
        assert row["claim"]["metric"] == card.claim.metric and row["claim"]["effect"] == card.claim.effect


@pytest.mark.parametrize("option", [("--family", "continual"), ("--family=continual",)])
def test_list_of_a_family(capsys, option):
    rows = json.loads(out_of(capsys, "list", *option, "--json").out)
    assert rows and {r["family"] for r in rows} == {"continual"}


@pytest.mark.parametrize("name", NAMES)
def test_show_tells_what_the_card_tells(capsys, name):
    card = zoo_package.card(name)
    out = out_of(capsys, "show", name).out
    flat = " ".join(out.split())
    for part in (card.title, card.idea, card.citation, card.official_code, card.cost, card.claim.statement):
        assert " ".join(part.split()) in flat
    for piece in card.pieces:
        assert f"{piece.rpartition(':')[2]}(" in out
    assert f"zoo train {name}" in out and f"zoo claim {name}" in out
    assert max(map(len, out.splitlines())) <= 160


@pytest.mark.parametrize("name", NAMES)
def test_show_as_json_describes_the_pieces(capsys, name):
    found = json.loads(out_of(capsys, "show", name, "--json").out)
    card = zoo_package.card(name)
    assert [p["piece"] for p in found["pieces"]] == list(card.pieces)
    assert all(p["signature"] and p["summary"] for p in found["pieces"])
    assert found["module"] == card.module and found["claim"]["statement"] == card.claim.statement


def test_help_list_and_show_are_quick_because_they_import_nothing_heavy(tmp_path):
    program = (
        "import resource, sys\n"
        "from trainers.cli import _run\n"
        "assert [_run(a) for a in (['--help'], ['list'], ['list', '--json'], ['show', 'teen'])] == [0] * 4\n"
        "heavy = {'jax', 'flax', 'numpy', 'tyro', 'optax', 'matplotlib', 'orbax', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, file=sys.stderr)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        times.append(float(done.stderr))
    assert min(times) < 0.5, times  # all four together, in time of this processor alone: the machine is shared


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    process = start("list", "--json", cwd=tmp_path)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err, err


def test_output_onto_a_full_disk_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "trainers.cli", "list"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("zoo: ") and done.stderr.count("\n") == 1 and "No space left" in done.stderr


# --------------------------------------------------------------------------------------------------------- train


def test_a_run_leaves_what_the_contract_says(trained):
    run = trained / "runs" / "teen"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"base", "after0", "after2"} <= {line["phase"] for line in lines}
    for picture in ("curves.png", "sessions.png"):
        assert (run / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((run / "tensorboard").glob("events*"))
    assert (run / "model" / "model.json").exists() and any((run / "checkpoints").iterdir())
    found = json.loads((run / "run.json").read_text())
    assert found["complete"] and found["method"] == "teen" and found["recipe"]["epochs"] == 1
    assert {"jax", "flax", "optax", "numpy", "zoo", "git"} <= set(found["versions"])
    assert not [p.name for p in run.iterdir() if p.name.startswith(".") or p.name.endswith(".tmp")]


def test_the_exported_model_loads_without_its_recipe(trained):
    import jax
    import jax.numpy as jnp

    import checkpoints

    model = checkpoints.load_model((trained / "runs" / "teen" / "model").absolute())
    assert model.info["method"] == "teen" and model.card["title"] == zoo_package.card("teen").title
    assert jax.tree.leaves(model.apply(jnp.zeros((3, 8, 8, 1))))[0].shape == (3, 10)


def test_started_again_it_says_that_it_is_complete_and_touches_nothing(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = contents(trained)
    out, err = out_of(capsys, "train", *TINY)
    assert err == "runs/teen: this run is complete; evaluate it with: zoo eval runs/teen\n"
    assert "accuracy" in out and "runs/teen/model" in out
    assert contents(trained) == before


def test_the_fields_of_the_data(capsys):
    for option in (["--data", "help"], ["--data=help"], ["--epochs", "1", "--data", "help"]):
        out = out_of(capsys, "train", "teen", *option).out
        assert [line.split()[0] for line in out.splitlines()] == ["x", "label"]


def test_help_of_a_recipe_explains_every_option(capsys):
    out, err = out_of(capsys, "train", "teen", "--help")
    assert not err and out.startswith("usage: zoo train teen ")
    text = " ".join(out.replace("│", " ").split())
    for piece in ("--shift-weight FLOAT", "--optimizer.learning-rate FLOAT Peak", "--init.only PATTERN ...",
                  "--workdir D ", "--data.path PATH", "--platform {cpu,gpu,tpu}", "--no-progress"):  # fmt: skip
        assert piece in text, piece
    assert "{None}" not in text
    # an option is followed by what it means, not at once by its default
    options = [line.split("│")[1].strip() for line in out.splitlines() if "│" in line]
    for i, line in enumerate(options):
        if line.startswith("--"):
            following = (line + " " + options[i + 1]).split(maxsplit=2)[-1]
            assert not following.startswith("(default"), line


@pytest.mark.parametrize("of", ["run", "model"])
def test_eval_agrees_with_the_metrics_of_the_run(trained, monkeypatch, capsys, of):
    monkeypatch.chdir(trained)
    run = json.loads(Path("runs/teen/run.json").read_text())
    before = contents(trained)
    out, _ = out_of(capsys, "eval", "runs/teen" if of == "run" else "runs/teen/model", "--json")
    found = json.loads(out)
    assert found["method"] == "teen" and found["metrics"]
    assert set(found["metrics"]) == {k for k in run["metrics"] if k.startswith("after2/")}
    for name, value in found["metrics"].items():
        assert value == pytest.approx(run["metrics"][name], abs=1e-6), name
    assert contents(trained) == before


def test_eval_as_text(trained, capsys):
    out = out_of(capsys, "eval", trained / "runs" / "teen").out
    assert out.startswith("teen from ") and "after2/accuracy" in out


def test_init_takes_what_the_patterns_name(trained, tmp_path, monkeypatch, capsys):
    from checkpoints.partial import load_weights

    monkeypatch.chdir(tmp_path)
    source = os.path.relpath(trained / "runs" / "teen")
    command = ("train", *TINY, "--optimizer.learning-rate", "1e-12", "--workdir", "w",
               "--init", source, "--init.only", "features/*")  # fmt: skip
    out, err = out_of(capsys, *command)
    assert f"--init {source}: " in err and "matched" in err
    ours, theirs = load_weights(tmp_path / "w"), load_weights(trained / "runs" / "teen")
    inside = [p for p in ours if p.startswith("features/")]
    outside = [p for p in ours if p not in inside]
    assert inside and outside
    for path in inside:
        np.testing.assert_allclose(ours[path], theirs[path], atol=1e-6)
    assert any(not np.allclose(ours[p], theirs[p], atol=1e-3) for p in outside)
    # the start is part of the run's identity
    assert zoo("train", *TINY, "--optimizer.learning-rate", "1e-12", "--workdir", "w") == 2
    assert "initialised differently" in capsys.readouterr().err


def test_init_renames_prefixes(trained, capsys):
    import jax.numpy as jnp

    from checkpoints.partial import load_weights
    from trainers.options import RunOptions

    source = load_weights(trained / "runs" / "teen")
    path = next(p for p in source if p.startswith("features/"))
    layer, name = path.removeprefix("features/").rsplit("/", 1)
    assert "/" not in layer
    options = RunOptions(init=str(trained / "runs" / "teen"), init_only=("body/*",), init_rename=("features=body",))
    edit, _ = options.initialiser()
    variables = {"params": {"body": {layer: {name: jnp.zeros_like(source[path])}}, "head": {"w": jnp.ones(2)}}}
    found = edit(variables)["params"]
    np.testing.assert_array_equal(found["body"][layer][name], source[path])
    np.testing.assert_array_equal(found["head"]["w"], np.ones(2))


def test_a_run_asked_to_stop_saves_and_the_same_command_finishes_it(tmp_path, monkeypatch, capsys):
    command = ("train", "teen", "--epochs", "40", "--devices", "1", "--no-progress", "--steps-per-call", "1",
               "--log-every", "1", "--workdir", "w")  # fmt: skip
    process = start(*command, cwd=tmp_path)
    log = tmp_path / "w" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert not out
    last = err.strip().splitlines()[-1]
    assert last.startswith("zoo: stopped in phase 'base' at step ") and last.endswith("goes on from here")
    step = int(last.split("at step ")[1].split(":")[0])
    monkeypatch.chdir(tmp_path)
    out, err = out_of(capsys, *command)
    assert f"phase 'base', step {step}" in err and "accuracy" in out
    steps = [h["step"] for line in log.read_text().splitlines() if (h := json.loads(line))["phase"] == "base"]
    assert steps == list(range(1, 561))


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    import trainers.run

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainers.run, "recipe_module", interrupted)
    assert zoo("train", *TINY) == 130
    assert capsys.readouterr().err == "zoo: interrupted\n"


# --------------------------------------------------------------------------------------- claim, bench and new


def test_claim_prints_and_keeps_every_arm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out, err = out_of(capsys, "claim", "teen", "--seeds", "2", "--json", "--output", "kept")
    found = json.loads(out)
    assert set(found["arms"]) == {"method", "baseline", "trivial", "a/a"}
    assert all(len(a["values"]) == 2 for a in found["arms"].values())
    assert found["verdict"] in ("confirmed", "not confirmed", "contradicted")
    assert len(found["paired"]["interval"]) == 2 and found["seeds"] == 2
    assert json.loads(Path("kept/teen.json").read_text()) == found
    assert Path("kept/teen.png").stat().st_size > 1000
    assert "seed 1" in err  # progress goes to standard error


def test_bench_times_the_hot_operation(monkeypatch, capsys):
    from trainers import bench

    monkeypatch.setattr(bench, "roofline", lambda: (1e10, 1e9))
    monkeypatch.setattr(bench, "timed", lambda fn, args, *_: 1e-3)
    rows = json.loads(out_of(capsys, "bench", "teen", "--json").out)
    for key in ("operation", "compile_seconds", "seconds", "flops", "bytes", "roofline_share"):
        assert key in rows[0], key
    assert rows[0]["roofline_share"] == pytest.approx(max(rows[0]["flops"] / 1e10, rows[0]["bytes"] / 1e9) / 1e-3)
    assert "roofline_share" in out_of(capsys, "bench", "teen").out


def test_json_has_null_where_a_number_is_not_finite(monkeypatch, capsys):
    from trainers import bench

    monkeypatch.setattr(bench, "method", lambda name: [{"operation": "x", "seconds": float("nan"), "n": [1.5]}])
    assert json.loads(out_of(capsys, "bench", "teen", "--json").out) == [
        {"operation": "x", "seconds": None, "n": [1.5]}
    ]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the zoo with a new method in it."""
    copy = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__")
    for room in ("zoo", "trainers", "data", "checkpoints"):
        shutil.copytree(ROOT / room, copy / room, ignore=ignore)
    (copy / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", copy / "tests")
    shutil.copy(ROOT / "pyproject.toml", copy)
    assert zoo("new", "comet", "--family", "vision", "--root", copy) == 0
    files = [copy / "zoo/vision/comet.py", copy / "trainers/recipes/vision/comet.py",
             copy / "tests/zoo/vision/test_comet.py"]  # fmt: skip
    return copy, files


def inside(tree, *command):
    env = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run([sys.executable, *command], cwd=tree, env=env, capture_output=True, text=True, timeout=300)


def test_new_writes_three_files_that_ruff_accepts(tree):
    copy, files = tree
    assert all(f.exists() for f in files)
    for room in ("zoo", "trainers/recipes"):
        assert (copy / room / "vision" / "__init__.py").exists()
    pytest.importorskip("ruff")
    for check in (["check"], ["format", "--check"]):
        done = inside(copy, "-m", "ruff", *check, *map(str, files))
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["x", "a_name_of_all_thirty_character"])
def test_new_files_are_tidy_however_long_the_name_is(tree, name, capsys):
    pytest.importorskip("ruff")
    copy, _ = tree
    out = out_of(capsys, "new", name, "--family", "recommendation", "--root", copy).out
    for check in (["check"], ["format", "--check"]):
        done = inside(copy, "-m", "ruff", *check, *out.split())
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_new_method_is_listed_trained_and_evaluated(tree):
    copy, _ = tree
    listed = inside(copy, "-m", "trainers.cli", "list", "--family", "vision")
    assert listed.stdout.startswith("comet "), listed.stderr
    done = inside(copy, "-m", "trainers.cli", "train", "comet", "--no-progress", "--devices", "1")
    assert done.returncode == 0, done.stderr
    assert (copy / "runs/comet/model/model.json").exists() and (copy / "runs/comet/curves.png").exists()
    claim = inside(copy, "-m", "trainers.cli", "claim", "comet")
    assert claim.returncode == 2 and "is not written yet" in claim.stderr and claim.stderr.count("\n") == 1


def test_the_test_of_a_new_method_fails_honestly(tree):
    copy, files = tree
    done = inside(copy, "-m", "pytest", "-q", "-o", "addopts=", str(files[2]))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 passed" in done.stdout and "1 failed" in done.stdout
    assert "write the method" in done.stdout


def test_a_program_whose_time_stamp_is_lost_is_removed_from_the_cache(tmp_path):
    import os

    from trainers.cli import _mend_cache

    for name in ("a-cache", "a-atime", "b-cache", "c-cache"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "c-cache").touch()  # being written now
    _mend_cache(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-atime", "a-cache", "c-cache"]
    _mend_cache(tmp_path / "nowhere")
