"""Diffusion and consistency recipes."""
