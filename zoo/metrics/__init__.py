"""Metrics: pure functions over padded arrays."""
