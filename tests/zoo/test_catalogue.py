"""The catalogue: cards read from source, names corrected, pieces that exist."""

import importlib

import pytest

import zoo
from zoo.catalogue import KINDS, _read_card, piece_signature


def test_every_card_belongs_to_its_module_and_names_real_pieces():
    names = [c.name for c in zoo.cards()]
    assert {"dbpm", "dsl", "muvera", "ict", "teen"} <= set(names) and len(set(names)) == len(names)
    for card in zoo.cards():
        assert card.kind in KINDS and card.family in zoo.FAMILIES
        module = importlib.import_module(card.module)
        assert card == module.CARD
        assert card.claim.effect > 0 and card.claim.seeds >= 3
        for piece in card.pieces:
            home, _, name = piece.rpartition(":")
            assert getattr(importlib.import_module(home or card.module), name).__doc__
            signature, summary = piece_signature(card, piece)
            assert signature.startswith(name) and summary


def test_every_method_has_a_recipe_with_its_five_parts():
    for card in zoo.cards():
        recipe = importlib.import_module(card.recipe)
        for part in ("Recipe", "fields", "arm", "benchmarks", "example"):
            assert callable(getattr(recipe, part)), f"{card.recipe} lacks {part}"
        assert recipe.fields()


def test_names_are_corrected():
    with pytest.raises(ValueError, match="unknown method 'ten'; did you mean teen"):
        zoo.card("ten")
    with pytest.raises(ValueError, match="unknown family 'retreival'; did you mean retrieval"):
        zoo.cards("retreival")
    assert [c.name for c in zoo.cards("continual")] == ["teen"]


def test_search_wants_every_word():
    assert "teen" in [c.name for c in zoo.search("few-shot prototype")]
    assert zoo.search("teen")[0].name == "teen"
    assert zoo.search("prototype nonsense-word") == ()


def test_cards_must_be_literal_and_last():
    with pytest.raises(ValueError, match="CARD must be the last statement, written in literals"):
        _read_card("CARD = Card(name=NAME)", "zoo.x.y")
    with pytest.raises(ValueError, match="literals"):
        _read_card("CARD = Card(nonsense=1)", "zoo.x.y")
