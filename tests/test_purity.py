"""Who may import whom, and that ``zoo/`` does no I/O: read from the source, so that lazy imports count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STDLIB = sys.stdlib_module_names

ARRAYS = {"jax", "flax", "optax", "chex", "jaxtyping", "numpy", "dm_pix"}
ROOMS = {
    "zoo": {"zoo", *ARRAYS},
    "data": {"data", "numpy", "jax", "dm_pix", "jaxtyping", "grain", "tensorflow_datasets", "sklearn", "array_record",
             "etils", "PIL", "matplotlib", "absl", "tokenizers", "scipy"},
    "checkpoints": {"checkpoints", "zoo", "jax", "flax", "numpy", "orbax", "etils", "jaxtyping", "tensorstore",
                    "ml_dtypes", "safetensors", "tokenizers", "huggingface_hub", "PIL"},
    "trainers": {"trainers", "zoo", "data", "checkpoints", "jax", "flax", "optax", "numpy", "tyro", "tqdm",
                 "tensorboardX", "matplotlib", "sklearn", "jaxtyping", "orbax"},
}  # fmt: skip
NOT_IN_ZOO = {
    "os", "pathlib", "io", "time", "logging", "socket", "subprocess", "tempfile", "random", "shutil", "sys", "json",
    "datetime", "threading", "urllib", "argparse", "pickle",
}  # fmt: skip
CALLS_NOT_IN_ZOO = {"open", "print", "input", "exec", "eval", "globals"}


def sources(room):
    return sorted((ROOT / room).rglob("*.py"))


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, node.lineno


def violations(room, text, name):
    tree = ast.parse(text)
    for module, line in imports(tree):
        top = module.split(".")[0]
        if top not in STDLIB and top not in ROOMS[room]:
            yield f"{name}:{line} {room}/ may not import {module}"
        if room == "zoo" and top in NOT_IN_ZOO:
            yield f"{name}:{line} zoo/ is pure, yet imports {module}"
        if (
            room == "checkpoints"
            and top == "zoo"
            and module not in ("zoo", "zoo.nn")
            and not module.startswith("zoo.nn.")
        ):
            yield f"{name}:{line} checkpoints/ may import zoo.nn only, not {module}"
    if room == "zoo":
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS_NOT_IN_ZOO:
                yield f"{name}:{node.lineno} zoo/ is pure, yet calls {node.func.id}()"
            if isinstance(node, (ast.Global, ast.Nonlocal)):
                yield f"{name}:{node.lineno} zoo/ has no globals"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    files = sources(room)
    assert files
    found = [v for f in files for v in violations(room, f.read_text(), f.relative_to(ROOT))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "text"),
    [
        ("zoo", "import os"),
        ("zoo", "def f():\n    from pathlib import Path"),
        ("zoo", "def f():\n    print(1)"),
        ("zoo", "open('x')"),
        ("zoo", "from trainers import loop"),
        ("zoo", "import scipy"),
        ("data", "from zoo import base"),
        ("checkpoints", "from trainers import loop"),
        ("checkpoints", "from zoo.timeseries import dbpm"),
        ("trainers", "import torch"),
    ],
)
def test_the_check_itself_finds_offenders(room, text):
    assert list(violations(room, text, "x.py"))


def test_linen_appears_only_in_modules_and_method_files():
    shared = ["losses", "ops", "optim", "weights", "metrics"]
    files = [f for part in shared for f in (ROOT / "zoo" / part).rglob("*.py")] + [ROOT / "zoo" / "base.py"]
    for room in ("data", "checkpoints"):
        files += sources(room)
    core = ("state", "step", "phases", "loop", "feed", "parallel", "evaluation", "resume", "recipe", "run")
    files += [ROOT / "trainers" / f"{name}.py" for name in core]
    for file in files:
        for module, line in imports(ast.parse(file.read_text())):
            assert not module.startswith("flax.linen"), f"{file.relative_to(ROOT)}:{line} imports Linen"
        assert "from flax import linen" not in file.read_text(), file


def test_the_spine_can_be_read_in_a_sitting():
    spine = ["zoo/base.py", "zoo/objectives.py", *(f"trainers/{n}.py" for n in ("state", "step", "phases", "loop"))]
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in spine}
    assert sum(lines.values()) < 1500, lines
    assert sum(v for k, v in lines.items() if k.startswith("trainers")) < 1000


def test_no_file_holds_two_things():
    long = {}
    for room in ROOMS:
        for f in sources(room):
            if (n := len(f.read_text().splitlines())) > 500:
                long[str(f.relative_to(ROOT))] = n
    assert not long, long


def test_every_public_name_has_a_docstring():
    missing = []
    for room in ROOMS:
        for file in sources(room):
            tree = ast.parse(file.read_text())
            if ast.get_docstring(tree) is None:
                missing.append(f"{file.relative_to(ROOT)}")
            for node in tree.body:
                public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
                if public and ast.get_docstring(node) is None:
                    missing.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not missing, "\n".join(missing)


def test_listing_the_zoo_imports_neither_jax_nor_numpy():
    program = (
        "import sys; sys.argv = ['zoo', 'list']\n"
        "from trainers.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {'jax', 'flax', 'numpy', 'tyro', 'optax', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ict" in done.stdout
