"""Slips listed mistakes into a method's files, one at a time, and runs its tests: every mutant must die.

    python tests/mutate.py dbpm            # reads tests/mutations/dbpm.json

Each entry: {"file": "zoo/...py", "find": "text that occurs exactly once", "replace": "...", "why": "..."}.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def survivors(name: str) -> list[str]:
    """The mutants of method ``name`` that its own tests let live."""
    alive = []
    plan = json.loads((ROOT / "tests" / "mutations" / f"{name}.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        ignore = shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv", "*.egg-info")
        shutil.copytree(ROOT, tree, ignore=ignore)
        env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        for mutant in plan["mutants"]:
            path = tree / mutant["file"]
            text = path.read_text()
            if text.count(mutant["find"]) != 1:
                raise SystemExit(
                    f"{name}: {mutant['find']!r} occurs {text.count(mutant['find'])} times in {mutant['file']}"
                )
            path.write_text(text.replace(mutant["find"], mutant["replace"]))
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                "-o",
                "addopts=",
            ]
            command += ["-m", "not slow and not claim and not bench", *plan["tests"]]
            done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
            path.write_text(text)
            if done.returncode not in (0, 1):
                raise SystemExit(f"{name}: pytest could not run the mutant {mutant['why']!r}:\n{done.stdout[-2000:]}")
            verdict = "killed" if done.returncode == 1 else "SURVIVED"
            print(f"{name}: {verdict:8s} {mutant['why']}", flush=True)
            if done.returncode == 0:
                alive.append(mutant["why"])
    return alive


if __name__ == "__main__":
    remaining = [f"{name}: {why}" for name in sys.argv[1:] for why in survivors(name)]
    sys.exit(1 if remaining else 0)
