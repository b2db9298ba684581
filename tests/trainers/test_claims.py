"""The claim machinery: the comparison of paired arms, the verdict, and what is kept."""

import dataclasses
import json
import types

import numpy as np
import pytest

from trainers import claims
from trainers.recipe import Recipe, Run, UserError
from zoo.catalogue import Card, Claim

CLAIM = Claim("better", metric="score", effect=0.1, method="new", baseline="old", trivial="none", seeds=3)
CARD = Card("toy", "vision", "Toy", 2024, "objective", "idea", "cite", ("x",), (), CLAIM, "none", "none")


def reference(method, baseline, sign, resamples=20_000):
    """The paired bootstrap of the mean, written out, with draws of its own."""
    differences = [sign * (m - b) for m, b in zip(method, baseline, strict=True)]
    rng = np.random.default_rng(123)
    means = []
    for _ in range(resamples):
        means.append(np.mean([differences[i] for i in rng.integers(0, len(differences), len(differences))]))
    ordered = np.sort(means)
    return ordered[int(0.025 * resamples)], ordered[int(0.975 * resamples)]


def test_the_interval_is_the_paired_bootstrap_of_the_mean():
    rng = np.random.default_rng(0)
    baseline = rng.normal(size=9)
    method = baseline + 0.3 + 0.2 * rng.normal(size=9)
    found = claims.paired(method, baseline, True, 0.1)
    low, high = reference(method, baseline, 1)
    spread = high - low
    np.testing.assert_allclose(found["interval"], [low, high], atol=0.05 * spread)
    np.testing.assert_allclose(found["mean"], np.mean(method - baseline))
    np.testing.assert_allclose(found["differences"], method - baseline)
    # pairing matters: the arms' own spread is much wider than the interval
    assert spread < 0.5 * baseline.std()


@pytest.mark.parametrize(
    ("differences", "effect", "verdict"),
    [
        ([0.3, 0.4, 0.35, 0.32], 0.1, "confirmed"),
        ([0.25, 0.5, 0.375, 0.375], 0.375, "confirmed"),  # the mean is exactly the effect
        ([0.3, 0.4, 0.35, 0.32], 0.5, "not confirmed"),  # an improvement, but a smaller one than was promised
        ([0.9, -0.2, 0.9, -0.2], 0.1, "not confirmed"),  # large but uncertain
        ([-0.3, -0.4, -0.35, -0.32], 0.1, "contradicted"),
        ([-0.9, 0.2, -0.9, 0.2], 0.1, "not confirmed"),
        ([0.0, 0.0, 0.0], 0.0, "not confirmed"),
        ([5.0], 0.1, "not confirmed"),  # one seed says nothing
        ([-5.0], 0.1, "not confirmed"),
    ],
)
def test_verdicts(differences, effect, verdict):
    baseline = np.zeros(len(differences))
    assert claims.paired(np.array(differences), baseline, True, effect)["verdict"] == verdict
    # where lower is better the same improvement is a fall
    lower = claims.paired(-np.array(differences), baseline, False, effect)
    assert lower["verdict"] == verdict
    np.testing.assert_allclose(lower["differences"], differences)


def test_probability_of_improvement_counts_ties_half():
    found = claims.paired(np.array([1.0, 0.0, -1.0, 1.0]), np.zeros(4), True, 0.1)
    assert found["probability_of_improvement"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert claims.paired(np.zeros(4), np.array([1.0, 0, -1, 1]), False, 0.1)["probability_of_improvement"] == 0.625


def test_equal_arms_are_never_confirmed():
    values = np.random.default_rng(0).normal(size=6)
    found = claims.paired(values, values, True, 0.0)
    assert found["verdict"] == "not confirmed" and found["interval"] == [0, 0]
    assert found["probability_of_improvement"] == 0.5


def test_noise_alone_is_rarely_confirmed():
    rng = np.random.default_rng(1)
    verdicts = [claims.paired(*rng.normal(size=(2, 8)), True, 0.05)["verdict"] for _ in range(40)]
    assert verdicts.count("confirmed") <= 6 and verdicts.count("contradicted") <= 6


@pytest.mark.parametrize(
    ("method", "baseline"),
    [([1.0, np.nan], [0.0, 0.0]), ([1.0, 2.0], [np.inf, 0.0]), ([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]])],
)
def test_arms_that_cannot_be_compared_are_refused(method, baseline):
    with pytest.raises(ValueError, match="finite|one value per seed"):
        claims.paired(np.array(method), np.array(baseline), True, 0.1)


@dataclasses.dataclass(frozen=True)
class Toy(Recipe):
    """A recipe of nothing."""

    def build(self):
        """Nothing but a checksum."""
        return Run([], export=None, data_fingerprint="checksum")


@pytest.fixture
def calls(monkeypatch):
    """A method whose arms are known, in place of a recipe's module."""
    made = []
    level = {"new": 1.0, "old": 0.5, "none": 0.0}

    def arm(name, seed):
        made.append((name, seed))
        return {"score": level[name] + 0.001 * seed, "other": 2.0}

    module = types.SimpleNamespace(arm=arm, Recipe=Toy)
    monkeypatch.setattr("trainers.run.recipe_module", lambda name: module)
    return made


def test_every_arm_runs_on_its_seeds(calls):
    said = []
    found = claims.run_claim(CARD, 3, said.append)
    assert [c for c in calls if c[1] < claims.AA_OFFSET] == [(a, s) for s in range(3) for a in ("new", "old", "none")]
    assert [c for c in calls if c[1] >= claims.AA_OFFSET] == [("old", claims.AA_OFFSET + s) for s in range(3)]
    assert len(said) == 12 and "seed 2" in said[-1]
    assert found["arms"]["method"]["values"] == [1.0, 1.001, 1.002]
    assert found["arms"]["a/a"]["values"] == pytest.approx([1.5, 1.501, 1.502])
    np.testing.assert_allclose(found["paired"]["differences"], 0.5)
    np.testing.assert_allclose(found["a/a"]["differences"], 0.001 * claims.AA_OFFSET)
    assert found["verdict"] == found["paired"]["verdict"] == "confirmed"
    assert found["arms"]["method"]["sd"] == pytest.approx(0.001)
    assert found["arms"]["trivial"]["all"][0] == {"score": 0.0, "other": 2.0}


def test_lower_is_better_turns_the_verdict(calls):
    card = dataclasses.replace(CARD, claim=dataclasses.replace(CLAIM, higher_is_better=False))
    assert claims.run_claim(card, 2)["verdict"] == "contradicted"


def test_what_is_kept(calls, tmp_path):
    found = claims.run_claim(CARD, 2)
    claims.store(found, tmp_path / "kept" / "here")
    kept = json.loads((tmp_path / "kept" / "here" / "toy.json").read_text())
    assert kept == json.loads(json.dumps(found))
    assert kept["claim"] == dataclasses.asdict(CLAIM) and kept["data"] == "checksum" and kept["seeds"] == 2
    assert len(kept["registered"]) == len(kept["recipe"]) == 16
    assert {"jax", "numpy", "git"} <= set(kept["versions"])
    assert all(a["seconds"] >= 0 for a in kept["arms"].values())
    assert (tmp_path / "kept" / "here" / "toy.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in (tmp_path / "kept" / "here").iterdir()) == ["toy.json", "toy.png"]


def test_registration_changes_with_what_was_promised(calls):
    one = claims.run_claim(CARD, 2)["registered"]
    other = dataclasses.replace(CARD, claim=dataclasses.replace(CLAIM, effect=0.01))
    assert claims.run_claim(other, 2)["registered"] != one == claims.run_claim(CARD, 3)["registered"]


def test_an_arm_without_the_metric_is_named(calls):
    card = dataclasses.replace(CARD, claim=dataclasses.replace(CLAIM, metric="accuracy"))
    with pytest.raises(UserError, match="toy: arm 'new' returned score, other, not 'accuracy'"):
        claims.run_claim(card, 1)


def test_an_arm_that_is_not_finite_is_named(monkeypatch):
    module = types.SimpleNamespace(arm=lambda name, seed: {"score": float("nan")}, Recipe=Toy)
    monkeypatch.setattr("trainers.run.recipe_module", lambda name: module)
    with pytest.raises(UserError, match="toy: arm 'new' on seed 0 returned score nan"):
        claims.run_claim(CARD, 1)


def test_the_table_says_it_all(calls):
    text = claims.table(claims.run_claim(CARD, 3))
    lines = text.splitlines()
    assert lines[0] == "claim: better"
    assert [line.split()[0] for line in lines[2:6]] == ["method", "baseline", "trivial", "a/a"]
    assert "method - baseline" in lines[6] and "+0.5" in lines[6] and "95 %" in lines[6] and "1.00" in lines[6]
    assert "A/A control" in lines[7]
    assert lines[-1] == "registered effect 0.1, 3 paired seeds: CONFIRMED"


def test_difference_from_a_published_result(calls):
    found = claims.run_claim(CARD, 3)
    assert claims.difference_from(found, found) is None
    published = {**found, "verdict": "not confirmed", "paired": {**found["paired"], "mean": 0.01}}
    assert claims.difference_from(found, published) == "toy: was not confirmed (+0.01), now confirmed (+0.5)"
    moved = {**published, "claim": {**found["claim"], "effect": 0.7}}
    assert "the registered effect changed" in claims.difference_from(found, moved)
