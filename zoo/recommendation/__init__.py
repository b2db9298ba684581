"""Recommendation methods."""
