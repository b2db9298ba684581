"""Kindred Zoo: published representation-learning systems as pure functions that compose.

``zoo.cards()``, ``zoo.card(name)`` and ``zoo.search(text)`` read the catalogue without importing jax; everything else
is imported by its path, which is its folder: ``from zoo.retrieval import muvera``.
"""

from zoo.catalogue import FAMILIES, Card, Claim, card, cards, search

__version__ = "0.1.0"
__all__ = ["FAMILIES", "Card", "Claim", "card", "cards", "search", "__version__"]
