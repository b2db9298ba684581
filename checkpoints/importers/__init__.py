"""Pretrained weights in and out: sources, layouts (one table per library and family), and the engine that runs them."""
