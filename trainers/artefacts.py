"""Artefacts: large arrays a phase makes and later phases read.  Saved once, fingerprinted, never with every step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.stream import arrays_fingerprint
from trainers.recipe import UserError
from trainers.trees import flatten, nest, to_host


def fingerprints(artefacts: Mapping[str, Any]) -> dict[str, str]:
    """A checksum by artefact name."""
    return {name: arrays_fingerprint(flatten(to_host(value))) for name, value in artefacts.items()}


def save(folder: Path, artefacts: Mapping[str, Any]) -> None:
    """Writes each artefact (an array or nested dicts of arrays) to ``folder/<name>.npz``, whole or not at all."""
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name, value in artefacts.items():
        flat = flatten({"": to_host(value)})
        np.savez(scratch / f"{name}.npz", **flat)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)


def load(root: Path, expected: Mapping[str, str]) -> dict[str, Any]:
    """Reads the artefacts named in ``expected`` back.

    Raises:
      UserError: one is missing or is not the one the checkpoint was made with.
    """
    found = {}
    for file in sorted(root.glob("*/*.npz"), key=lambda f: f.stat().st_mtime):
        if file.stem in expected:
            with np.load(file) as stored:
                flat = {k: stored[k] for k in stored.files}
            value = flat[""] if list(flat) == [""] else nest(flat, "")
            if fingerprints({file.stem: value})[file.stem] == expected[file.stem]:
                found[file.stem] = value
    missing = sorted(set(expected) - set(found))
    if missing:
        raise UserError(f"artefact {missing[0]!r} under {root} is missing or is not the one of this checkpoint")
    return {name: found[name] for name in expected}
