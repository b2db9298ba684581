"""The words of a mapping table: which source weight becomes which leaf, and by what reversible rearrangement.

    Rule("h.{i}.attn.c_attn.weight", ("layers/query/kernel[{i}]", "layers/key/kernel[{i}]", "layers/value/kernel[{i}]"),
         Split(1, 3))
    *linear("encoder.layer.{i}.output.dense", "layer{i}/output")

``{i}`` stands for a whole number, the same one on both sides; ``{i+1}`` and ``{i-1}`` on the target's side shift it;
a target that ends in ``[{i}]`` is row i of a leaf stacked over layers.  Target paths lie in ``params`` unless they
begin with another collection (``batch_stats/...``, ``constants/...``).  Every operation is a rearrangement of
the same bytes, so a table runs backwards too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

COLLECTIONS = ("params", "batch_stats", "constants")


class Op:
    """A reversible rearrangement of one or several arrays."""

    def forward(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """From the source's arrays to the target's."""
        raise NotImplementedError

    def backward(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """From the target's arrays to the source's."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Transpose(Op):
    """Axes in a new order: axis ``axes[k]`` of the source becomes axis k of the target."""

    axes: tuple[int, ...]

    def forward(self, arrays):
        """See :class:`Op`."""
        return [np.transpose(a, self.axes) for a in arrays]

    def backward(self, arrays):
        """See :class:`Op`."""
        return [np.transpose(a, np.argsort(self.axes)) for a in arrays]


@dataclasses.dataclass(frozen=True)
class Reshape(Op):
    """``source`` shape to ``target`` shape (row-major); at most one -1 in each."""

    source: tuple[int, ...]
    target: tuple[int, ...]

    def forward(self, arrays):
        """See :class:`Op`."""
        return [self._to(a, self.source, self.target) for a in arrays]

    def backward(self, arrays):
        """See :class:`Op`."""
        return [self._to(a, self.target, self.source) for a in arrays]

    @staticmethod
    def _to(array, before, after):
        if len(before) != array.ndim or any(b not in (-1, n) for b, n in zip(before, array.shape, strict=True)):
            raise ValueError(f"a reshape from {before} met {array.shape}")
        return array.reshape(after)


@dataclasses.dataclass(frozen=True)
class Split(Op):
    """One array into several along an axis: ``parts`` equal ones, or of the given sizes."""

    axis: int
    parts: int | tuple[int, ...]

    def forward(self, arrays):
        """See :class:`Op`."""
        (array,) = arrays
        size = array.shape[self.axis]
        sizes = (size // self.parts,) * self.parts if isinstance(self.parts, int) else self.parts
        if sum(sizes) != size:
            raise ValueError(f"a split into {self.parts} along axis {self.axis} met {array.shape}")
        return np.split(array, np.cumsum(sizes)[:-1], axis=self.axis)

    def backward(self, arrays):
        """See :class:`Op`."""
        return [np.concatenate(arrays, axis=self.axis)]


@dataclasses.dataclass(frozen=True)
class Fuse(Op):
    """Several arrays into one along an axis; the reverse of :class:`Split`."""

    axis: int
    parts: int | tuple[int, ...]

    def forward(self, arrays):
        """See :class:`Op`."""
        return Split(self.axis, self.parts).backward(arrays)

    def backward(self, arrays):
        """See :class:`Op`."""
        return Split(self.axis, self.parts).forward(arrays)


LINEAR = Transpose((1, 0))
"""torch's ``Linear`` [out, in] -> kernel [in, out]."""
CONV1D = Transpose((2, 1, 0))
"""torch's ``Conv1d`` [out, in, k] -> [k, in, out]."""
CONV2D = Transpose((2, 3, 1, 0))
"""torch's ``Conv2d`` [out, in, h, w] -> [h, w, in, out]."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      source: pattern of the source's name, or several that are fused.
      target: pattern of the target's path, or several into which the source is split.
      ops: what turns the one into the other, in order.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    ops: tuple[Op, ...] = ()

    def __post_init__(self):
        """Puts single names and ops into tuples."""
        object.__setattr__(self, "source", _tuple(self.source))
        object.__setattr__(self, "target", tuple(_with_collection(t) for t in _tuple(self.target)))
        object.__setattr__(self, "ops", _tuple(self.ops))

    def forward(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The targets' arrays from the sources'."""
        out = list(arrays)
        for op in self.ops:
            out = op.forward(out)
        if len(out) != len(self.target):
            raise ValueError(f"{self.source} gives {len(out)} arrays for {len(self.target)} targets")
        return out

    def backward(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The sources' arrays from the targets'."""
        out = list(arrays)
        for op in reversed(self.ops):
            out = op.backward(out)
        return out


def linear(source: str, target: str) -> tuple[Rule, ...]:
    """torch's ``Linear``: ``weight`` (transposed) and ``bias``."""
    return Rule(f"{source}.weight", f"{target}/kernel", LINEAR), Rule(f"{source}.bias", f"{target}/bias")


def conv2d(source: str, target: str) -> tuple[Rule, ...]:
    """torch's ``Conv2d``: ``weight`` and ``bias``."""
    return Rule(f"{source}.weight", f"{target}/kernel", CONV2D), Rule(f"{source}.bias", f"{target}/bias")


def norm(source: str, target: str) -> tuple[Rule, ...]:
    """``LayerNorm``, ``GroupNorm`` or ``RMSNorm``: ``weight`` -> scale, ``bias``."""
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


def batch_norm(source: str, target: str) -> tuple[Rule, ...]:
    """``BatchNorm`` with its running statistics."""
    return (
        *norm(source, target),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
    )


def embedding(source: str, target: str) -> tuple[Rule, ...]:
    """``Embedding``: ``weight`` -> embedding."""
    return (Rule(f"{source}.weight", f"{target}/embedding"),)


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


def _with_collection(path: str) -> str:
    return path if path.split("/")[0] in COLLECTIONS else f"params/{path}"
