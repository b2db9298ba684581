"""Where weights come from and go to: the store of a run, partial restore, and self-describing exported models."""

from checkpoints.arrays import CheckpointError, DamagedError, StoreError
from checkpoints.model import Model, ModelError, load_model, save_model
from checkpoints.partial import MergeError, MergeReport, load_collections, load_weights, merge, merge_variables
from checkpoints.store import Store

__all__ = [
    "CheckpointError", "DamagedError", "MergeError", "MergeReport", "Model", "ModelError", "Store", "StoreError",
    "load_collections", "load_model", "load_weights", "merge", "merge_variables", "save_model",
]  # fmt: skip
