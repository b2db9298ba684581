"""Shared pure array operations."""
