"""The ``zoo`` command.  Options of ``zoo train`` are made from the method's recipe; jax is imported only to compute."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

USAGE = """usage: zoo COMMAND ...

A functional JAX zoo of methods that learn, compare, compress and search representations.

  zoo list [--family F] [--json]            the methods: name, family, year, kind, title
  zoo show NAME [--json]                    one method's card: idea, citation, pieces, claim, cost
  zoo train NAME [--workdir D] [...]        run its recipe (offline, on embedded data); resumes if D holds the run
  zoo eval D [--json]                       evaluate a finished run or an exported model
  zoo claim NAME [--seeds N] [--json]       method against baseline over paired seeds, with the verdict
  zoo bench NAME|trainer|losses|backbones|import  time the hot operation: compile time, rate, share of the roofline
  zoo compose [--json]                      which loss transformation goes on which host, or why not
  zoo import SRC --to D [--as LAYOUT]       pretrained weights (hub id, safetensors, torch file) into a model here
  zoo export D --to F                       and back to safetensors under the original names
  zoo new NAME --family F                   write the three files of a new method
  zoo COMMAND --help                        the options of a command

"""


def main(argv: list[str] | None = None) -> None:
    """Entry point: exits 0, or 2 with one line for anything the user can mend."""
    status = _run(list(sys.argv[1:] if argv is None else argv))
    try:
        sys.stdout.flush()
    except OSError as error:  # nobody reads any more, or standard output is a file on a full disk
        status = status if isinstance(error, BrokenPipeError) else _fail(f"standard output: {error.strerror}")
        _hush()
    sys.exit(status)


def _run(argv: list[str]) -> int:
    commands = {
        "list": _list, "show": _show, "train": _train, "eval": _eval, "claim": _claim, "bench": _bench, "new": _new,
        "import": _import, "export": _export, "compose": _compose,
    }  # fmt: skip
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(USAGE, end="")
            return 0
        if argv[0] == "--version":
            import zoo

            print(zoo.__version__)
            return 0
        if argv[0] not in commands:
            return _fail(f"unknown command {argv[0]!r}; {_nearest(argv[0], list(commands))}")
        return commands[argv[0]](argv[1:])
    except BrokenPipeError:  # `zoo list | head -1`: the reader has what it wanted
        _hush()
        return 0
    except SystemExit as stop:  # --help of a parser
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:  # what the user can mend is one line; anything else is ours and keeps its traceback
        line = None if os.environ.get("ZOO_TRACEBACK") else _one_line(error)
        if line is None:
            raise
        return _fail(line, getattr(error, "exit_status", 2))


USERS = {"UserError", "DataError", "CheckpointError", "MergeError", "CompositionError", "ModelError", "Diverged",
         "ImporterError"}  # fmt: skip
"""Errors, by name so that nothing heavy is imported, whose message is written for the user."""


def _one_line(error: Exception) -> str | None:
    """What to tell the user about an error that she can mend; ``None`` for one that is ours."""
    names = {k.__name__ for k in type(error).__mro__}
    if names & (USERS | {"StoreError", "Interrupted"}):
        full = _errno_of(error)
        return f"{error}{'' if full is None or full in str(error) else f' ({full})'}"
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        return (
            f"{what}{error.strerror or error}" if not isinstance(error, ConnectionError) else f"no connection: {error}"
        )
    if isinstance(error, (ValueError, KeyError)) and _raised_by_us(error):
        return str(error.args[0]) if error.args else None
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        return "the device is out of memory; lower --batch-size, or spread the run with --fsdp"
    return None


def _errno_of(error: BaseException) -> str | None:
    """The file system's own words below a wrapped error, such as "No space left on device"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error.strerror if isinstance(error, OSError) else None


def _raised_by_us(error: Exception) -> bool:
    """Whether a ``raise`` statement of this package made it, rather than a library below or a slip of ours."""
    import linecache

    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    file = Path(trace.tb_frame.f_code.co_filename)
    root = Path(__file__).resolve().parent.parent
    ours = any(root / room in file.parents for room in ("zoo", "data", "checkpoints", "trainers"))
    return ours and linecache.getline(str(file), trace.tb_lineno).lstrip().startswith("raise ")


def _hush() -> None:
    """Nobody reads standard output any more: Python must not complain about it when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_jax(platform: str | None) -> None:
    """Settings of jax for a command: the platform, and a compilation cache that stores small programs too.

    JAX's own thresholds would store nothing of recipes like ours.  What the environment says is left as it is.
    """
    import importlib.util

    import jax

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kindred-zoo" / "compiled"
    _mend_cache(root)
    settings = {
        "jax_compilation_cache_dir": str(root),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    if importlib.util.find_spec("filelock"):  # jax needs it to keep a bound, and refuses to cache without
        settings["jax_compilation_cache_max_size"] = 2 << 30
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    if platform:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(platform, platform))


def _mend_cache(folder: Path) -> None:
    """Removes programs whose time stamp is missing: a kill leaves one, and jax then warns at every program."""
    import time

    try:
        there = {entry.name: entry for entry in os.scandir(folder)}
        for name, entry in there.items():
            lone = name.endswith("-cache") and f"{name.removesuffix('-cache')}-atime" not in there
            if lone and time.time() - entry.stat().st_mtime > 60:  # not one that is being written now
                os.unlink(entry.path)
    except OSError:  # no folder yet, or another process was quicker
        return


def check_platform(platform: str) -> None:
    """Starts jax on the platform; raises UserError if it has no such devices here."""
    import jax

    from trainers.errors import UserError

    try:
        found = jax.devices()[0].platform
    except Exception as error:  # RuntimeError or AssertionError, by what is installed
        gist = str(error).split("\n")[0].split(" (you may")[0] or "no such devices, or jax is installed without it"
        raise UserError(f"--platform {platform} cannot be used here: {gist}") from None
    if found != platform:
        raise UserError(f"--platform {platform} cannot be used here: jax runs on {found}")


def print_json(found: Any) -> None:
    """One JSON document on standard output; what is not finite is null, as JSON has no word for it."""
    print(json.dumps(_finite(found), indent=1, allow_nan=False))


def _finite(found: Any) -> Any:
    if isinstance(found, dict):
        return {k: _finite(v) for k, v in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(v) for v in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _fail(line: str, status: int = 2) -> int:
    print("zoo: " + " ".join(line.split()), file=sys.stderr)
    return status


def _nearest(name: str, known: list[str]) -> str:
    from trainers.errors import nearest

    return nearest(name, known)


def parse_options(
    argv: list[str], usage: str, flags: tuple[str, ...] = (), values: tuple[str, ...] = (), names: int = 0
):
    """A small strict parser for the commands without a recipe: unknown options are errors."""
    from trainers.errors import UserError

    found: dict[str, Any] = dict.fromkeys(flags, False) | dict.fromkeys(values)
    positional: list[str] = []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if arg in ("-h", "--help"):
            print(usage)
            raise SystemExit(0)
        key, equals, value = arg[2:].partition("=") if arg.startswith("--") else ("", "", "")
        if key in flags and not equals:
            found[key] = True
        elif key in flags:
            raise UserError(f"--{key} takes no value, got {value!r}")
        elif key in values:
            if not equals and (not rest or rest[0].startswith("--")):
                raise UserError(f"--{key} needs a value; {usage.splitlines()[0]}")
            found[key] = value if equals else rest.pop(0)
        elif arg.startswith("-"):
            known = [f"--{o}" for o in (*flags, *values)]
            raise UserError(f"unknown option {arg!r}; {_nearest(arg, known)}")
        else:
            positional.append(arg)
    if len(positional) != names:
        raise UserError(usage.split("\n")[0])
    return positional, found


def _count(text: str | None, option: str, default: int) -> int:
    from trainers.errors import UserError

    if text is None:
        return default
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise UserError(f"--{option} needs a whole number of at least 1, got {text!r}")
    return int(text)


# ------------------------------------------------------------------------------------------------- list and show


def _list(argv: list[str]) -> int:
    import zoo

    _, o = parse_options(argv, "usage: zoo list [--family F] [--json]", ("json",), ("family",))
    cards = zoo.cards(o["family"])
    if o["json"]:
        keys = ("name", "family", "title", "year", "kind", "plugs_into", "claim")
        print_json([{k: c.to_dict()[k] for k in keys} for c in cards])
        return 0
    width = max((len(c.name) for c in cards), default=4)
    for c in cards:
        print(f"{c.name:{width}}  {c.family:14}  {c.year}  {c.kind:18}  {c.title}")
    return 0


def _show(argv: list[str]) -> int:
    import zoo
    from trainers.show import show
    from zoo.catalogue import piece_signature

    (name,), o = parse_options(argv, "usage: zoo show NAME [--json]", ("json",), names=1)
    c = zoo.card(name)
    pieces = [(p, *piece_signature(c, p)) for p in c.pieces]
    if o["json"]:
        described = [{"piece": p, "signature": s, "summary": d} for p, s, d in pieces]
        print_json({**c.to_dict(), "pieces": described})
        return 0

    show(c, pieces)
    return 0


# --------------------------------------------------------------------------------------------------------- train


TRAIN_USAGE = """usage: zoo train NAME [--workdir D] [options]

Runs a method's recipe, offline and on embedded data unless told otherwise, and leaves in D (runs/NAME if not given)
metrics.jsonl, curves.png, TensorBoard events, checkpoints and an exported model.  A run found in D is resumed.

  zoo train NAME --help         the options of a recipe
  zoo train NAME --data help    the data fields it needs
  zoo list                      the methods
"""


def _train(argv: list[str]) -> int:
    from trainers.errors import UserError

    if argv[:1] in (["-h"], ["--help"]):
        print(TRAIN_USAGE, end="")
        return 0
    if not argv or argv[0].startswith("-"):
        raise UserError("zoo train needs a method's name first: zoo train NAME [options]; zoo list names them")
    name, rest = argv[0], argv[1:]
    import zoo

    zoo.card(name)  # an unknown name answers before jax is imported
    if "--data=help" in rest or ("--data", "help") in zip(rest, rest[1:], strict=False):
        from trainers.run import recipe_module

        for field, meaning in recipe_module(name).fields().items():
            print(f"{field:12}  {meaning}")
        return 0
    from trainers.options import RunOptions, parse
    from trainers.run import recipe_module, train

    recipe, options = parse(recipe_module(name).Recipe, RunOptions, rest, f"zoo train {name}")
    prepare_jax(options.platform)
    workdir = Path(options.workdir or Path("runs") / name)
    settings, init, source = options.settings(), *options.initialiser()
    if options.platform:
        check_platform(options.platform)
    summary = train(
        name, recipe, workdir, settings,
        keep=options.keep, progress=options.progress, init=init, initialised_from=source,
    )  # fmt: skip
    if summary.get("already"):
        print(f"{workdir}: this run is complete; evaluate it with: zoo eval {workdir}", file=sys.stderr)
    if summary.get("summary"):
        print(summary["summary"])
    pictures = ", ".join(sorted(str(p) for p in workdir.glob("*.png") if not p.name.startswith(".")))
    print(f"{workdir}/model holds the model; pictures: {pictures or 'none'}")
    return 0


def _eval(argv: list[str]) -> int:
    (folder,), o = parse_options(argv, "usage: zoo eval D [--json]", ("json",), names=1)
    prepare_jax(None)
    from trainers.evaluate_run import evaluate_folder

    with contextlib.redirect_stdout(sys.stderr):
        found = evaluate_folder(Path(folder))
    if o["json"]:
        print_json(found)
        return 0
    print(f"{found['method']} from {found['folder']} ({found['weights']})")
    for k, v in found["metrics"].items():
        print(f"  {k:40} {v:.6g}")
    return 0


# ------------------------------------------------------------------------------------------------ claim and bench


def _claim(argv: list[str]) -> int:
    usage = "usage: zoo claim NAME [--seeds N] [--output DIR] [--json]"
    (name,), o = parse_options(argv, usage, ("json",), ("seeds", "output"), names=1)
    import zoo

    card = zoo.card(name)
    seeds = _count(o["seeds"], "seeds", card.claim.seeds)
    folder = Path(o["output"] or "runs/claims")
    prepare_jax(None)
    from trainers import claims
    from trainers.run import make_writable

    make_writable(folder, "--output")  # before minutes of work, not after
    with contextlib.redirect_stdout(sys.stderr):
        found = claims.run_claim(card, seeds, lambda text: print(text, flush=True))
        claims.store(found, folder)
    if o["json"]:
        print_json(found)
    else:
        print(claims.table(found))
        print(f"kept in {folder / name}.json, drawn in {folder / name}.png")
    return 0


def _bench(argv: list[str]) -> int:
    (name,), o = parse_options(
        argv, "usage: zoo bench NAME|trainer|losses|backbones|import [--json]", ("json",), names=1
    )
    if name not in ("trainer", "losses", "backbones", "import"):
        import zoo

        zoo.card(name)
    prepare_jax(None)
    from trainers import bench

    with contextlib.redirect_stdout(sys.stderr):
        if name in ("backbones", "import"):
            from trainers import bench_backbones

            rows = bench_backbones.backbones() if name == "backbones" else bench_backbones.importing()
        elif name == "losses":
            from trainers import bench_losses

            rows = bench_losses.losses()
        else:
            rows = bench.trainer() if name == "trainer" else bench.method(name)
    if o["json"]:
        print_json(rows)
    else:
        print(bench.table(rows))
    return 0


def _import(argv: list[str]) -> int:
    from trainers.weights_cli import import_weights

    return import_weights(argv)


def _export(argv: list[str]) -> int:
    from trainers.weights_cli import export_weights

    return export_weights(argv)


def _compose(argv: list[str]) -> int:
    usage = "usage: zoo compose [--transformation T] [--host H] [--json]"
    _, o = parse_options(argv, usage, ("json",), ("transformation", "host"))
    prepare_jax(None)
    from trainers import compose

    rows = compose.report(o["transformation"], o["host"])
    print_json(rows) if o["json"] else print(compose.describe(rows))
    return 0


def _new(argv: list[str]) -> int:
    (name,), o = parse_options(argv, "usage: zoo new NAME --family F [--root DIR]", (), ("family", "root"), names=1)
    from trainers.scaffold import write_method

    for file in write_method(name, o["family"], Path(o["root"] or ".")):
        print(file)
    return 0


def capture_parser_errors(parse: Callable[[], Any], prog: str, known: Sequence[str] = ()) -> Any:
    """Runs a tyro parser; its boxed error text becomes one UserError line.  ``known`` are the options there are."""
    from trainers.errors import UserError

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return parse()
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(parser_message(errors.getvalue(), prog, known)) from None


def parser_message(boxed: str, prog: str, known: Sequence[str] = ()) -> str:
    """The gist of tyro's boxed error: its message, put in words, and the options that were perhaps meant."""
    lines = [line.strip("│|╭╮╰╯ ") for line in boxed.splitlines()][1:]  # the first line is a title
    parts: list[list[str]] = [[]]
    for line in lines:  # separated by rules, drawn as the terminal's encoding allows
        if line.strip("─- "):
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    text = re.sub(r"\s+([.,;])", r"\1", " ".join(parts[0])).rstrip(".")
    if found := re.fullmatch(r"Error parsing (--\S+?): invalid literal for int\(\).*?: (.*)", text):
        return f"{found[1]} needs a whole number, got {found[2]}"
    if found := re.fullmatch(r"Error parsing (--\S+?): could not convert string to float: (.*)", text):
        return f"{found[1]} needs a number, got {found[2]}"
    if found := re.match(r"Missing value for argument '(--\S+?)'", text):
        return f"{found[1]} needs a value"
    if found := re.fullmatch(r"invalid choice (.*) for argument '(--\S+?)'. Expected one of \((.*?),?\)", text):
        return f"{found[2]} {found[1]} is not a choice; choose among {found[3].replace(chr(39), '')}"
    if found := re.fullmatch(r"Unrecognized options: (.*)", text):
        wrong = [word for word in found[1].split(", ") if word.startswith("-")]
        if not wrong:
            return f"unexpected argument {found[1].split(', ')[0]!r}; {prog} --help lists the options"
        near = dict.fromkeys(m[1] for part in parts[1:] for line in part if (m := re.match(r"(--[\w.-]+)", line)))
        near = near or dict.fromkeys(nearest_options(wrong[0], known))
        hint = f"did you mean {' or '.join(list(near)[:3])}?" if near else f"{prog} --help lists the options"
        return f"unknown option {wrong[0]!r}; {hint}"
    return text


def nearest_options(wrong: str, known: Sequence[str]) -> list[str]:
    """Options whose last part is near the wrong one's: ``--lerning-rate`` finds ``--optimizer.learning-rate``."""
    import difflib

    last = lambda option: option.lstrip("-").partition("=")[0].rpartition(".")[2]  # noqa: E731
    by_last: dict[str, list[str]] = {}
    for option in known:
        by_last.setdefault(last(option), []).append(option)
    return [o for part in difflib.get_close_matches(last(wrong), by_last, n=2, cutoff=0.6) for o in by_last[part]]


if __name__ == "__main__":
    main()
