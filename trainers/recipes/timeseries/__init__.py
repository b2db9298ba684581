"""Recipes of the time-series methods."""
