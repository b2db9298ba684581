"""The ``zoo`` command for its tests: run in this process, refusals checked, folders compared before and after."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def zoo(*argv: str) -> int:
    """Runs the command in this process; its exit status."""
    from trainers.cli import _run

    return _run(list(map(str, argv)))


def refused(capsys, *argv: str, says: tuple[str, ...] = ()) -> str:
    """Asserts that a command exits 2 with one clear line on standard error, which is returned."""
    capsys.readouterr()
    status = zoo(*argv)
    out, err = capsys.readouterr()
    assert status == 2, (status, out, err)
    assert not out, out
    assert err.startswith("zoo: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and len(err) < 600, err
    for word in says:
        assert word in err, (word, err)
    return err


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes (None for a folder) below a folder, by relative path."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


def start(*argv: str, cwd: Path, **rest) -> subprocess.Popen:
    """The command in a process of its own, standard output and error piped."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainers.cli", *map(str, argv)]
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **rest
    )


TINY = ("teen", "--epochs", "1", "--devices", "1", "--no-progress")
"""A run of seconds."""
