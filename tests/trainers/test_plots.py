"""Pictures: that they are there, whole, and show what they should."""

import math

import numpy as np
import pytest

from trainers import plots


def size(file):
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


HISTORY = [
    *({"phase": "warm", "step": s, "loss": 1.0 / s} for s in (1, 2, 3)),
    {"phase": "warm", "step": 3, "held/accuracy": 0.5},
    *({"phase": "main", "step": s, "loss": 0.1 / s} for s in (2, 4)),
]


def test_curves_are_written_whole(tmp_path):
    plots.curves(HISTORY, tmp_path / "curves.png", "toy")
    width, height = size(tmp_path / "curves.png")
    assert width > 200 and height > 200
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def drawn(monkeypatch, history, tmp_path):
    """The axes of the figure that would have been saved."""
    kept = []
    monkeypatch.setattr(plots, "save", lambda fig, file: kept.append(fig))
    plots.curves(history, tmp_path / "x.png", "toy")
    return {a.get_title(): a for a in kept[0].axes} if kept else {}


def test_phases_follow_each_other(monkeypatch, tmp_path):
    axes = drawn(monkeypatch, HISTORY, tmp_path)
    line = axes["loss"].get_lines()[0]
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 5, 7])
    np.testing.assert_allclose(line.get_ydata(), [1, 1 / 2, 1 / 3, 0.05, 0.025])
    assert set(axes) == {"loss"}  # one point makes no curve


def test_single_points_are_drawn_if_there_is_nothing_else(monkeypatch, tmp_path):
    axes = drawn(monkeypatch, [{"phase": "fit", "step": 1, "a": 1.0, "b": 2.0}], tmp_path)
    assert set(axes) == {"a", "b"}


def test_wide_ranges_are_logarithmic_and_words_are_left_out(monkeypatch, tmp_path):
    history = [{"phase": "t", "step": s, "wide": 10.0**s, "flat": 1.0, "odd": "nan"} for s in range(1, 5)]
    axes = drawn(monkeypatch, history, tmp_path)
    assert axes["wide"].get_yscale() == "log" and axes["flat"].get_yscale() == "linear"
    assert "odd" not in axes


def test_values_that_are_not_finite_do_not_stop_the_drawing(tmp_path):
    history = [{"phase": "t", "step": s, "loss": v} for s, v in enumerate((1.0, math.inf, math.nan, 2.0), 1)]
    plots.curves(history, tmp_path / "c.png", "toy")
    size(tmp_path / "c.png")


def test_a_run_without_metrics_draws_nothing(tmp_path):
    plots.curves([], tmp_path / "c.png", "toy")
    plots.curves([{"phase": "t", "step": 1}], tmp_path / "c.png", "toy")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_fails_leaves_the_older_one(tmp_path):
    file = tmp_path / "c.png"
    plots.curves(HISTORY, file, "toy")
    before = file.read_bytes()

    class Broken:
        def savefig(self, scratch):
            scratch.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        plots.save(Broken(), file)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.png"]


def test_image_grid_places_images_row_by_row():
    images = np.arange(3 * 2 * 2, dtype=np.float32).reshape(3, 2, 2) + 1
    sheet = plots.image_grid(images, 2)
    assert sheet.shape == (7, 7)
    np.testing.assert_array_equal(sheet[1:3, 1:3], images[0])
    np.testing.assert_array_equal(sheet[1:3, 4:6], images[1])
    np.testing.assert_array_equal(sheet[4:6, 1:3], images[2])
    assert (sheet[4:6, 4:6] == 1).all() and (sheet[0] == 1).all() and (sheet[:, 3] == 1).all()
