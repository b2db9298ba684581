"""Small files of ``torch.save``: plain, nested, tied, strided, of every number type; and some that must be refused."""

import argparse
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent.parent / "torch"


class Thing:
    """A class that a file may name."""


def main():
    """Writes tests/golden/torch/*."""
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(0)
    table = torch.randn(5, 4)
    state = {
        "embed.weight": table,
        "head.weight": table,
        "strided": torch.arange(24.0).reshape(4, 6).T[1:, ::2],
        "row": torch.arange(10.0)[3:7],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.tensor([1, -2]),
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    torch.save(state, FOLDER / "plain.pt")
    arrays = {
        k: v.detach().float().numpy() if v.dtype == torch.bfloat16 else v.detach().numpy() for k, v in state.items()
    }
    np.savez_compressed(FOLDER / "plain.npz", **arrays)
    torch.save({"epoch": 3, "state_dict": state, "args": {"lr": 0.1, "name": "x"}}, FOLDER / "nested.pt")
    torch.save({"student": {"w": torch.ones(2)}, "teacher": {"w": torch.zeros(2)}}, FOLDER / "two.pt")
    torch.save({"w": torch.ones(2), "thing": Thing()}, FOLDER / "class.pt")
    torch.save({"w": torch.ones(2), "args": argparse.Namespace(lr=1)}, FOLDER / "namespace.pt")
    torch.save({"w": torch.ones(2, dtype=torch.complex64)}, FOLDER / "complex.pt")
    torch.save(state, FOLDER / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save([torch.ones(2)], FOLDER / "list.pt")
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 2), torch.nn.ModuleDict({"inner": torch.nn.BatchNorm1d(2)})["inner"]
    )
    network.register_buffer("resolution", torch.tensor(32))
    network.sizes = [1, 2]
    torch.jit.save(torch.jit.script(network), FOLDER / "script.pt")
    np.savez_compressed(FOLDER / "script.npz", **{k: v.numpy() for k, v in network.state_dict().items()})


if __name__ == "__main__":
    main()
