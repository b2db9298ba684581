"""Our own TFDS builders: written as array_record without TensorFlow, read back by name.

prepare_digits(data_dir)
prepare_series("../shared/data/ucr", "GunPoint", data_dir)        # then load_tfds("time_series/GunPoint", "train", ...)
prepare_interactions("ratings.csv", "mine", data_dir)             # then load_tfds("interactions/mine", "train", ...)
"""

from data.builders.digits import Digits, prepare_digits
from data.builders.interactions import Interactions, prepare_interactions
from data.builders.series import TimeSeries, prepare_series

__all__ = ["Digits", "Interactions", "TimeSeries", "prepare_digits", "prepare_interactions", "prepare_series"]
