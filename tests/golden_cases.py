"""Golden cases of the backbones: weights in a reference library's own keys, inputs, and what it made of them."""

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from checkpoints.importers.engine import Imported, import_tensors

FOLDER = Path(__file__).resolve().parent / "golden" / "backbones"


class Case:
    """One case: ``imported`` (module, variables, report), ``inputs`` and ``outputs`` by name."""

    def __init__(self, name: str, layout: str | None = None):
        folder = FOLDER / name
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else None
        self.name, self.config, self.tensors = name, config, load_file(folder / "model.safetensors")
        with np.load(folder / "io.npz") as found:
            self.inputs = {k[3:]: found[k] for k in found.files if k.startswith("in.")}
            self.outputs = {k[4:]: found[k] for k in found.files if k.startswith("out.")}
        self.imported: Imported = import_tensors(self.tensors, config, layout)
        self.module, self.variables = self.imported.module, self.imported.variables


@functools.cache
def load(name: str, layout: str | None = None) -> Case:
    """The case of a name; the layout is recognised unless it is given."""
    return Case(name, layout)


def names(prefix: str = "") -> list[str]:
    """The cases whose name begins so."""
    return sorted(p.parent.name for p in FOLDER.glob(f"{prefix}*/case.json"))


def error(ours, reference) -> float:
    """The largest difference, relative to the largest reference value."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert np.isfinite(ours).all()
    return float(np.abs(ours - reference).max() / max(np.abs(reference).max(), 1e-12))


def close(ours, reference, tolerance: float = 1e-5) -> None:
    """Asserts :func:`error` within the tolerance."""
    found = error(ours, reference)
    assert found <= tolerance, f"relative error {found:.2e}"
