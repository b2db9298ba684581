"""Retrieval recipes."""
