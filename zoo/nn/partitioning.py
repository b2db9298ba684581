"""Logical axis names on parameters, so that FSDP and tensor sharding need no code per model.

A module names the axes of each parameter where it makes it; one table says which mesh axis carries which name:

    kernel = self.param("kernel", partitioned(nn.initializers.lecun_normal(), EMBED, MLP), (width, hidden))
    y = Dense(hidden, axes=(EMBED, MLP))(x)
    abstract = abstract_variables(module)                     # shapes, dtypes and names; nothing is allocated
    specs = partition_specs(abstract, mesh)                   # nested PartitionSpecs for any mesh with these axes

``module.init`` returns Flax's boxes (``LogicallyPartitioned``), which hold the names; :func:`unbox` takes them off, and
modules run with boxed and with plain arrays alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

EMBED, MLP, HEADS, VOCAB, LAYERS = "embed", "mlp", "heads", "vocab", "layers"
"""Width of the residual stream; hidden width of a feed-forward block; all heads' queries, keys or values side by side;
tokens of a vocabulary; blocks stacked by a scan.  Any other axis (kernel height, norm scale, position) is ``None``."""

MESH_AXES: Mapping[str, str] = {EMBED: "fsdp", MLP: "tensor", HEADS: "tensor", VOCAB: "tensor"}
"""Which mesh axis carries which logical one: Megatron's columns-then-rows over ``tensor``, the rest over ``fsdp``."""


def partitioned(init: Callable, *axes: str | None) -> Callable:
    """An initialiser whose result carries logical axis names, one per dimension."""
    return nn.with_logical_partitioning(init, axes)


class Dense(nn.Module):
    """A linear map over the last axis, with logical axis names.

    Attributes:
      features: size of the result.
      axes: logical names of (input, output).
      use_bias: whether a bias is added.
      dtype: of the computation.
      param_dtype: of the parameters.
      kernel_init: initialiser of the kernel ``[in, features]``.
    """

    features: int
    axes: tuple[str | None, str | None] = (None, None)
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*dims i"]) -> Float[Array, "*dims o"]:
        """``[..., in] -> [..., features]``."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", partitioned(self.kernel_init, *self.axes), shape, self.param_dtype)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, self.axes[1])
            y = y + self.param("bias", zeros, (self.features,), self.param_dtype).astype(self.dtype)
        return y


class Embed(nn.Module):
    """A table of rows by id, with logical axis names; ``attend`` scores against every row (tied output heads).

    Attributes:
      rows, features: size of the table.
      axes: logical names of (rows, features).
      dtype, param_dtype: as in :class:`Dense`.
      init: initialiser of ``embedding [rows, features]``.
    """

    rows: int
    features: int
    axes: tuple[str | None, str | None] = (VOCAB, EMBED)
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    init: Callable = nn.initializers.normal(0.02)

    def setup(self):
        """Makes the table."""
        table = partitioned(self.init, *self.axes)
        self.embedding = self.param("embedding", table, (self.rows, self.features), self.param_dtype)

    def __call__(self, ids: Array) -> Array:
        """Integer ids ``[...]`` to rows ``[..., features]``."""
        return jnp.take(self.embedding, ids, axis=0).astype(self.dtype)

    def attend(self, x: Float[Array, "*dims d"]) -> Float[Array, "*dims v"]:
        """``[..., features] -> [..., rows]``: inner products with every row."""
        return x.astype(self.dtype) @ self.embedding.astype(self.dtype).T


def unbox(variables: Any) -> Any:
    """Variables without the boxes that hold axis names."""
    return nn.meta.unbox(variables)


def abstract_variables(module: nn.Module) -> Any:
    """What ``module.init`` would make, boxed, as ``ShapeDtypeStruct``: nothing is computed or allocated.

    The module says what it is called with: ``module.example_inputs() -> {argument: ShapeDtypeStruct}``.
    """
    return jax.eval_shape(lambda inputs: module.init(jax.random.key(0), **inputs), module.example_inputs())


def axis_names(variables: Any) -> dict[str, tuple[str | None, ...]]:
    """Path (``params/layers/query/kernel``) -> logical names, of the leaves that carry some."""
    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables, is_leaf=is_box)[0]:
        if isinstance(leaf, nn.LogicallyPartitioned):
            found["/".join(str(p.key) for p in path)] = tuple(leaf.names)
    return found


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, mesh_axes: Mapping[str, str] = MESH_AXES
) -> P:
    """The spec of one parameter: an axis goes to its mesh axis once, and only where that divides it."""
    used: set[str] = set()
    spec: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        axis = mesh_axes.get(name) if name else None
        fits = axis in mesh.shape and axis not in used and size % mesh.shape[axis] == 0
        spec.append(axis if fits else None)
        used.add(axis) if fits else None
    return P(*spec)


def shardings(variables: Any, mesh: Mesh, mesh_axes: Mapping[str, str] = MESH_AXES) -> dict[str, NamedSharding]:
    """Path -> sharding of every leaf of boxed (abstract) variables; leaves without names are replicated."""
    names = axis_names(variables)
    flat = jax.tree_util.tree_flatten_with_path(unbox(variables))[0]
    paths = {"/".join(str(p.key) for p in path): leaf for path, leaf in flat}
    spec = lambda path, x: partition_spec(names[path], x.shape, mesh, mesh_axes) if path in names else P()  # noqa: E731
    return {path: NamedSharding(mesh, spec(path, x)) for path, x in paths.items()}
