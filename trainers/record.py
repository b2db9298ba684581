"""What a run tells: a progress bar, ``metrics.jsonl``, TensorBoard events, and notes."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Record:
    """Receives a run's metrics; this base keeps them in memory and prints nothing."""

    def __init__(self):
        self.history: list[dict[str, Any]] = []

    @property
    def lines(self) -> int:
        """How many lines have been logged; a checkpoint remembers it."""
        return len(self.history)

    def rewind(self, lines: int) -> None:
        """Forgets what was logged after a checkpoint."""
        del self.history[lines:]

    def phase(self, name: str, start: int, steps: int) -> None:
        """A phase begins (or goes on at ``start``)."""

    def compiled(self, seconds: float) -> None:
        """A step was compiled."""

    def advance(self, step: int) -> None:
        """A step was dispatched."""

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Metrics of one step."""
        self.history.append({"phase": phase, "step": step, **values})

    def note(self, text: str) -> None:
        """A line for the user."""

    def close(self) -> None:
        """Finishes files."""


class FileRecord(Record):
    """Writes a run's folder: ``metrics.jsonl`` (no clocks in it, so two equal runs have equal files), TensorBoard
    events under ``tensorboard/``, and a progress bar with phase, rate, loss and time left on standard error.

    Args:
      folder: the run's folder.
      progress: whether to show the bar.
      write: whether this process writes files (process 0 of several).
    """

    def __init__(self, folder: Path, progress: bool = True, write: bool = True):
        super().__init__()
        self.folder, self.progress, self.write = folder, progress and write, write
        self.file = folder / "metrics.jsonl"
        if self.file.exists():
            for line in self.file.read_text().splitlines():
                try:
                    self.history.append(json.loads(line))
                except json.JSONDecodeError:
                    break  # the line a killed process was writing
        self._stream = None
        self._events = None
        self._bar = None
        self._clock = (time.monotonic(), 0)
        self._total = 0

    def rewind(self, lines: int) -> None:
        """Cuts the file to its first ``lines`` lines."""
        super().rewind(lines)
        if self.write:
            self._close_stream()
            scratch = self.file.with_suffix(".tmp")
            scratch.write_text("".join(_line(h) for h in self.history))
            scratch.replace(self.file)

    def phase(self, name: str, start: int, steps: int) -> None:
        """Starts a progress bar for the phase."""
        self._finish_bar()
        self._clock = (time.monotonic(), start)
        if self.progress:
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True, mininterval=0.2, leave=True,
                file=sys.stderr, smoothing=0.05,
            )  # fmt: skip

    def compiled(self, seconds: float) -> None:
        """Notes the compilation time on the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"compiled in {seconds:.1f} s")

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Appends a line, TensorBoard scalars, and the loss to the bar."""
        super().log(phase, step, values)
        if not self.write:
            return
        if self._stream is None:
            self._stream = self.file.open("a")
        self._stream.write(_line(self.history[-1]))
        self._stream.flush()
        if self._events is None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._total or None)
        for k, v in values.items():
            if math.isfinite(v):
                self._events.add_scalar(f"{phase}/{k}", v, step)
        now = time.monotonic()
        if step > self._clock[1] and now > self._clock[0]:
            rate = (step - self._clock[1]) / (now - self._clock[0])
            self._events.add_scalar(f"{phase}/steps_per_second", rate, step)
        self._clock = (now, step)
        if self._bar is not None:
            shown = [f"{k} {v:.4g}" for k, v in values.items() if k == "loss" or k.endswith("/loss")]
            if shown:
                self._bar.set_postfix_str(", ".join(shown), refresh=False)

    def note(self, text: str) -> None:
        """Prints a line on standard error, above the bar."""
        if not self.write:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Closes the bar and the files."""
        self._finish_bar()
        self._close_stream()
        if self._events is not None:
            self._events.close()
            self._events = None

    def _finish_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _line(entry: Mapping[str, Any]) -> str:
    finite = {k: (repr(v) if isinstance(v, float) and not math.isfinite(v) else v) for k, v in entry.items()}
    return json.dumps(finite) + "\n"
