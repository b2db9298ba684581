"""Lineage: which models may be compared, and what is said of those that may not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops import lineage as lines
from zoo.ops.fingerprint import fingerprint
from zoo.ops.lineage import check_comparable, comparable, lineage, lineage_of_text, lineage_text

P, Q = jnp.eye(3), 2 * jnp.eye(3)  # two frames
W = [{"w": jnp.full(2, float(i))} for i in range(5)]


def test_a_shared_frame_makes_strangers_comparable():
    a, b, c = lineage(P, W[0]), lineage(P, W[1]), lineage(Q, W[2])
    assert comparable(a, b) and comparable(b, a)
    assert not comparable(a, c) and not comparable(c, a)
    np.testing.assert_array_equal(a["frame"], fingerprint(P))
    np.testing.assert_array_equal(a["id"], fingerprint(W[0]))


def test_the_same_model_is_comparable_with_itself():
    assert comparable(lineage(P, W[0]), lineage(Q, W[0]))


def test_alignment_reaches_back_along_the_chain_and_never_forward():
    a = lineage(P, W[0])
    b = lineage(Q, W[1], a)
    c = lineage(jnp.ones(2), W[2], b)
    assert comparable(b, a) and comparable(c, b) and comparable(c, a)
    assert not comparable(a, b) and not comparable(b, c)


def test_a_free_update_breaks_the_chain():
    a = lineage(P, W[0])
    b = lineage(Q, W[1], a, aligned=False)
    c = lineage(jnp.ones(2), W[2], b)
    assert not comparable(b, a) and comparable(c, b) and not comparable(c, a)
    assert lineage_text(c)["parents"] == [lineage_text(b)["id"], lineage_text(a)["id"]]
    assert lineage_text(c)["aligned"] == [True, False]


def test_the_refusal_names_both():
    a, c = lineage(P, W[0]), lineage(Q, W[2])
    check_comparable(a, lineage(P, W[1]))
    with pytest.raises(ValueError, match="extract the gallery again") as caught:
        check_comparable(a, c)
    line = str(caught.value)
    assert "\n" not in line
    for record, who in ((a, "query"), (c, "gallery")):
        text = lineage_text(record)
        assert f"{who} model {text['id']} (frame {text['frame']})" in line


def test_text_and_back():
    c = lineage(jnp.ones(2), W[2], lineage(Q, W[1], lineage(P, W[0]), aligned=False))
    again = lineage_of_text(lineage_text(c))
    assert set(again) == set(c)
    for k in c:
        np.testing.assert_array_equal(again[k], c[k])
        assert again[k].dtype == c[k].dtype
    assert len(lineage_text(c)["frame"]) == 16
    for bad in ({}, {**lineage_text(c), "frame": "xyz"}, {**lineage_text(c), "aligned": []}):
        with pytest.raises(ValueError, match="not a lineage record"):
            lineage_of_text(bad)


def test_ancestors_have_fixed_room(monkeypatch):
    monkeypatch.setattr(lines, "ANCESTORS", 2)
    record = lineage(P, W[0])
    for w in W[1:]:
        record = lineage(P, w, record)
    assert record["parents"].shape == (2, 2)
    np.testing.assert_array_equal(record["parents"][0], fingerprint(W[3]))
    np.testing.assert_array_equal(record["parents"][1], fingerprint(W[2]))


def test_records_are_made_under_jit():
    a = lineage(P, W[0])
    made = jax.jit(lambda w, parent: lineage(P, w, parent))(W[1], a)
    for k, v in lineage(P, W[1], a).items():
        np.testing.assert_array_equal(made[k], v)
