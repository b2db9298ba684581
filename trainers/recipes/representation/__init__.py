"""Recipes of the representation family."""
