"""Continual-learning recipes."""
