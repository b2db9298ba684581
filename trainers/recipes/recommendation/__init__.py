"""Recipes of the recommendation methods."""
