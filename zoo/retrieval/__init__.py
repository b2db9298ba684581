"""Retrieval methods."""
