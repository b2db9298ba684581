"""Shared Flax Linen modules and backbones."""
