"""Time-series methods."""
