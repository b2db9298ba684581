"""Writes tests/golden/README.md from what is recorded with each case: ``python tests/golden/make/readme.py``."""

import gzip
import json
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent.parent
HEAD = """# Golden files

Numbers that other programs made, kept small.  `<method>.md` beside a method's arrays says what made them.

`backbones/<case>/` holds a model's random weights in its library's **own keys** (`model.safetensors`, `config.json`),
the inputs and the library's outputs (`io.npz`), and the call that made them (`case.json`); so a test of the outputs is
a test of the importer too.  `keys/<model>.json.gz` are the names and shapes of a published checkpoint at full size,
with its published number of parameters.  `torch/` holds small files of `torch.save`.

All of them are made by the scripts in `make/`, which need the `parity` extra:

    pip install -e '.[parity]'
    python tests/golden/make/<family>.py        # some say at their head which checkouts they need besides
    python tests/golden/make/readme.py          # writes this file; needs nothing

Weights come from a fixed seed, and nothing keeps a value (a scale of one, a bias of zero) that hides a lost weight.

"""


def text() -> str:
    """The whole file."""
    lines = [HEAD + "## Backbones", "", "| case | made by | call |", "| --- | --- | --- |"]
    for file in sorted(GOLDEN.glob("backbones/*/case.json")):
        case = json.loads(file.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in case["versions"].items())
        call = " ".join(case["call"].split()).replace("|", "\\|")
        call = call if len(call) <= 180 else f"{call[:180]} ... (in full in case.json)"
        lines.append(f"| `{file.parent.name}` | {versions} | {call} |")
    lines += [
        "",
        "## Key lists",
        "",
        "| model | layout | weights | parameters | published in |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file in sorted(GOLDEN.glob("keys/*.json.gz")):
        found = json.loads(gzip.decompress(file.read_bytes()))
        source = " ".join(str(found["source"]).split()).replace("|", "\\|")
        name = file.name.removesuffix(".json.gz")
        lines.append(f"| `{name}` | {found['layout']} | {len(found['keys'])} | {found['total']:,} | {source} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (GOLDEN / "README.md").write_text(text())
