"""The options that every ``zoo train`` shares, and the command line made from a recipe's dataclass."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from trainers.cli import capture_parser_errors, prepare_jax
from trainers.recipe import Recipe, UserError

__all__ = ["RunOptions", "join_processes", "parse", "prepare_jax"]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How the run is executed; none of these changes what is learned (except --init)."""

    workdir: Annotated[str | None, tyro.conf.arg(metavar="D")] = None
    """Folder of the run; runs/NAME if not given. A run found there is resumed."""
    mode: Literal["jit", "pmap"] = "jit"
    """jit over a mesh (data, fsdp, tensor), or pmap over all devices."""
    devices: int = 0
    """How many devices to use; 0 for all."""
    fsdp: int = 1
    """Devices over which parameters and optimiser state are sharded."""
    tensor: int = 1
    """Devices over which layers are sharded, by the recipe's rules."""
    steps_per_call: int = 0
    """Steps scanned in one dispatch; 0 for the recipe's own choice."""
    log_every: int = 0
    """Steps between log lines; 0 for a hundredth of the phase."""
    save_every: int = 0
    """Steps between checkpoints; 0 for a tenth of the phase."""
    keep: int = 3
    """Newest checkpoints kept (the best by a watched metric is kept besides)."""
    progress: bool = True
    """Show a progress bar."""
    init: Annotated[str | None, tyro.conf.arg(metavar="D")] = None
    """Start from the weights of another run, an exported model or an import (zoo import)."""
    init_only: Annotated[tuple[str, ...], tyro.conf.arg(name="init.only", metavar="PATTERN ...")] = ("*",)
    """Patterns over this run's parameter paths that are taken from --init, such as encoder/*; quote them."""
    init_rename: Annotated[tuple[str, ...], tyro.conf.arg(name="init.rename", metavar="OLD=NEW ...")] = ()
    """Path prefixes of --init's weights and what they are called here."""
    platform: Annotated[Literal["cpu", "gpu", "tpu"] | None, tyro.conf.arg(metavar="{cpu,gpu,tpu}")] = None
    """Which of jax's platforms to use; the best there is if not given."""
    distributed: bool = False
    """Join other processes by jax.distributed (addresses from the cluster or from JAX_COORDINATOR_ADDRESS)."""

    def settings(self):
        """These options as ``trainers.loop.Settings``."""
        from trainers.loop import Settings
        from trainers.parallel import Parallel

        for option in ("devices", "steps_per_call", "log_every", "save_every"):
            if getattr(self, option) < 0:
                raise UserError(f"--{option.replace('_', '-')} must not be negative, got {getattr(self, option)}")
        if self.keep < 1:
            raise UserError(f"--keep must be at least 1, got {self.keep}")
        if self.distributed:
            join_processes()
        parallel = Parallel(self.mode, self.devices, self.fsdp, self.tensor)
        return Settings(parallel, self.steps_per_call, self.log_every, self.save_every)

    def initialiser(self) -> tuple[Callable[[Mapping], Mapping] | None, str | None]:
        """What ``--init`` does to the first variables, and its description for the run's identity."""
        if self.init is None:
            if self.init_only != ("*",) or self.init_rename:
                raise UserError("--init.only and --init.rename need --init RUN")
            return None, None
        if not Path(self.init).exists():
            raise UserError(f"--init {self.init}: there is no such folder")
        wrong = [r for r in self.init_rename if r.count("=") != 1]
        if wrong:
            raise UserError(f"--init.rename {wrong[0]}: write OLD=NEW")
        rename = dict(r.split("=") for r in self.init_rename)

        def edit(variables: Mapping) -> Mapping:
            import sys

            from checkpoints.partial import load_collections, merge_variables

            source = load_collections(Path(self.init).absolute())
            merged, report = merge_variables(variables, source, self.init_only, rename)
            print(f"--init {self.init}: {report}", file=sys.stderr)
            return merged

        return edit, f"{self.init} only {self.init_only} rename {self.init_rename}"


def option_names(settings: Any, prefix: str = "--") -> list[str]:
    """The options made from a dataclass with defaults, nested ones with a dot."""
    names: list[str] = []
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name.replace("_", "-")
        names += option_names(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return names


def parse(recipe: type[Recipe], options: type, argv: list[str], prog: str) -> tuple[Recipe, Any]:
    """Parses a command line into a recipe and run options; unknown options and wrong values are one-line errors."""
    joined = dataclasses.make_dataclass(
        "Options",
        [
            ("recipe", Annotated[recipe, tyro.conf.arg(name="")], dataclasses.field(default=recipe())),
            ("options", Annotated[options, tyro.conf.arg(name="")], dataclasses.field(default=options())),
        ],
        frozen=True,
    )
    description = inspect.cleandoc(recipe.__doc__ or "")
    if {"-h", "--help"} & set(argv):
        tyro.cli(joined, args=argv, prog=prog, description=description)
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "2000"  # errors are read back from tyro's box: its lines must not be broken
    try:
        parsed = lambda: tyro.cli(joined, args=argv, prog=prog, description=description)  # noqa: E731
        found = capture_parser_errors(parsed, prog, [*option_names(recipe()), *option_names(options())])
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
    if not 0 <= found.recipe.seed < 2**32:
        raise UserError(f"--seed must lie in 0 .. 2**32 - 1, got {found.recipe.seed}")
    return found.recipe, found.options


def join_processes() -> None:
    """``jax.distributed.initialize``, with addresses from the environment where no cluster tells them."""
    import jax

    if jax.distributed.is_initialized():
        return
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        missing = [k for k in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if k not in env]
        if missing:
            raise UserError(f"--distributed: JAX_COORDINATOR_ADDRESS is set, but {missing[0]} is not")
        jax.distributed.initialize(
            env["JAX_COORDINATOR_ADDRESS"], int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        )
    else:
        jax.distributed.initialize()
