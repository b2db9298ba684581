"""Losses shared by methods: pure functions that return one value per element."""
