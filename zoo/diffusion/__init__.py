"""Diffusion and consistency methods."""
