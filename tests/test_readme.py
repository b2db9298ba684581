"""The README's table is the one made from the cards and the kept claims."""

import json
from pathlib import Path

import zoo
from trainers.readme import with_table

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_is_current():
    text = (ROOT / "README.md").read_text()
    assert with_table(text, ROOT) == text, "run: python -m trainers.readme"


def test_what_made_each_golden_file_is_said():
    import runpy

    made = runpy.run_path(str(ROOT / "tests" / "golden" / "make" / "readme.py"))["text"]()
    assert made == (ROOT / "tests" / "golden" / "README.md").read_text(), "run: python tests/golden/make/readme.py"


def test_every_claim_is_kept_as_it_was_registered():
    for card in zoo.cards():
        found = json.loads((ROOT / "tests" / "claims" / f"{card.name}.json").read_text())
        claim = found["claim"]
        registered = ("metric", "effect", "method", "baseline", "trivial", "higher_is_better")
        assert [claim[k] for k in registered] == [getattr(card.claim, k) for k in registered]
        assert found["seeds"] >= 5 and found["verdict"] == found["paired"]["verdict"]
        assert found["verdict"] == "confirmed" or card.claim.remark, f"{card.name}: say why it was not confirmed"
        assert found["a/a"]["verdict"] != "confirmed"
        for field in ("recipe", "data", "versions", "arms"):
            assert found[field]
