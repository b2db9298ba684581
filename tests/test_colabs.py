"""The notebooks run from the first cell to the last, at a small size, and are stored without outputs."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
SAYS = {
    "quickstart": ("dbpm", "plug-in on", "features (96, 32)"),
    "representation": (
        "in version 1's gallery, simplex and HOC",
        "OCA",
        "contrastive + TCM: OPIS",
        "relative: Jaccard",
        "LogME",
    ),
    "retrieval": ("BM25", "ADORE + LeanVec", "MUVERA", "ANNCUR", "ADORE + DBNorm", "PR AUC", "interpolation"),
}
"""What a run of each prints, among other things."""


def read(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_there_is_a_quickstart_and_every_notebook_says_something():
    assert set(SAYS) == {p.stem for p in NOTEBOOKS}


def test_a_family_notebook_has_a_section_for_each_of_its_methods():
    import zoo

    for family in ("representation", "retrieval"):
        source = (ROOT / "colabs" / f"{family}.ipynb").read_text()
        for card in zoo.cards(family):
            assert card.name in source, f"{card.name} has no section in colabs/{family}.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_without_outputs_and_with_short_words_between(path):
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
        else:
            assert len(cell.source) < 800
    first = next(c for c in notebook.cells if c.cell_type == "code")
    assert "pip" in first.source and "jax.__version__" in first.source  # a fresh Colab begins here


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_at_a_small_size(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = read(path)
    # one device, as in a fresh Colab, whatever this suite simulates
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))
    monkeypatch.setenv("ZOO_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own, which shows figures in the notebook
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert pictures and all(len(p) > 5000 for p in pictures)
    text = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert not [words for words in SAYS[path.stem] if words not in text]
