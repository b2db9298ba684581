"""The ``zoo`` command.  Options of ``zoo train`` are made from the method's recipe; jax is imported only to compute."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

USAGE = """usage: zoo COMMAND ...

A functional JAX zoo of methods that learn, compare, compress and search representations.

  zoo list [--family F] [--json]            the methods: name, family, year, kind, title
  zoo show NAME [--json]                    one method's card: idea, citation, pieces, claim, cost
  zoo train NAME [--workdir D] [...]        run its recipe (offline, on embedded data); resumes if D holds the run
  zoo eval D [--json]                       evaluate a finished run or an exported model
  zoo claim NAME [--seeds N] [--json]       method against baseline over paired seeds, with the verdict
  zoo bench NAME|trainer [--json]           time the hot operation: compile time, rate, share of the roofline
  zoo new NAME --family F                   write the three files of a new method
  zoo COMMAND --help                        the options of a command

"""


def main(argv: list[str] | None = None) -> None:
    """Entry point: exits 0, or 2 with one line for anything the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with contextlib.suppress(BrokenPipeError):
        sys.exit(_run(argv))


def _run(argv: list[str]) -> int:
    commands = {
        "list": _list, "show": _show, "train": _train, "eval": _eval, "claim": _claim, "bench": _bench, "new": _new,
    }  # fmt: skip
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if argv[0] == "--version":
        import zoo

        print(zoo.__version__)
        return 0
    if argv[0] not in commands:
        return _fail(f"unknown command {argv[0]!r}; {_nearest(argv[0], list(commands))}")
    if os.environ.get("ZOO_TRACEBACK"):
        return commands[argv[0]](argv[1:])
    try:
        return commands[argv[0]](argv[1:])
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror}" if error.strerror else str(error))
    except Exception as error:  # what the user can mend is one line; anything else is ours and keeps its traceback
        if _is_users(error):
            return _fail(str(error), getattr(error, "exit_status", 2))
        raise


def _is_users(error: Exception) -> bool:
    kinds = {"UserError", "DataError", "CheckpointError", "StoreError", "CompositionError", "ModelError", "Diverged"}
    names = {k.__name__ for k in type(error).__mro__}
    return bool(names & (kinds | {"Interrupted"})) or (isinstance(error, ValueError) and _raised_by_us(error))


def _raised_by_us(error: Exception) -> bool:
    """Whether our own code raised it on purpose, rather than a library deep below."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = Path(trace.tb_frame.f_code.co_filename) if trace else Path()
    root = Path(__file__).resolve().parent.parent
    return any(root / room in file.parents for room in ("zoo", "data", "checkpoints", "trainers"))


def _fail(line: str, status: int = 2) -> int:
    print("zoo: " + " ".join(line.split()), file=sys.stderr)
    return status


def _nearest(name: str, known: list[str]) -> str:
    from trainers.errors import nearest

    return nearest(name, known)


def _options(argv: list[str], usage: str, flags: tuple[str, ...] = (), values: tuple[str, ...] = (), names: int = 0):
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
        elif key in values:
            if not equals and not rest:
                raise UserError(f"--{key} needs a value; {usage}")
            found[key] = value if equals else rest.pop(0)
        elif arg.startswith("-"):
            known = [f"--{o}" for o in (*flags, *values)]
            raise UserError(f"unknown option {arg!r}; {_nearest(arg, known)}")
        else:
            positional.append(arg)
    if len(positional) != names:
        raise UserError(usage)
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

    _, o = _options(argv, "usage: zoo list [--family F] [--json]", ("json",), ("family",))
    cards = zoo.cards(o["family"])
    if o["json"]:
        keys = ("name", "family", "title", "year", "kind", "plugs_into", "claim")
        print(json.dumps([{k: c.to_dict()[k] for k in keys} for c in cards], indent=1))
        return 0
    width = max((len(c.name) for c in cards), default=4)
    for c in cards:
        print(f"{c.name:{width}}  {c.family:14}  {c.year}  {c.kind:18}  {c.title}")
    return 0


def _show(argv: list[str]) -> int:
    import textwrap

    import zoo
    from zoo.catalogue import piece_signature

    (name,), o = _options(argv, "usage: zoo show NAME [--json]", ("json",), names=1)
    c = zoo.card(name)
    pieces = [(p, *piece_signature(c, p)) for p in c.pieces]
    if o["json"]:
        described = [{"piece": p, "signature": s, "summary": d} for p, s, d in pieces]
        print(json.dumps({**c.to_dict(), "pieces": described}, indent=1))
        return 0
    fill = lambda text, indent="  ": textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=indent)  # noqa: E731
    print(f"{c.name}: {c.title} ({c.year})\n{c.family}, {c.kind}\n")
    print(fill(c.idea, ""), "\n")
    print(f"citation       {c.citation}\nofficial code  {c.official_code}")
    print(f"plugs into     {', '.join(c.plugs_into)}\ncost           {c.cost}")
    print(f"import         from {c.module.rpartition('.')[0]} import {c.name}\nrecipe         zoo train {c.name}")
    if c.departures:
        print("departures")
        for d in c.departures:
            print(textwrap.fill(d, 100, initial_indent="  - ", subsequent_indent="    "))
    print("pieces")
    for _, signature, summary in pieces:
        print(textwrap.fill(signature, 100, initial_indent="  ", subsequent_indent="      "))
        print(fill(summary, "      "))
    claim = c.claim
    print(f"claim\n{fill(claim.statement)}")
    better = "higher" if claim.higher_is_better else "lower"
    print(f"  {claim.metric} ({better} is better): {claim.method} against {claim.baseline}, effect of interest"
          f" {claim.effect:g}, trivial arm {claim.trivial}; zoo claim {c.name}")  # fmt: skip
    return 0


# --------------------------------------------------------------------------------------------------------- train


def _train(argv: list[str]) -> int:
    from trainers.errors import UserError

    if not argv or argv[0] in ("-h", "--help"):
        print("usage: zoo train NAME [--workdir D] [options]; zoo train NAME --help lists the recipe's options")
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    import zoo

    zoo.card(name)  # an unknown name answers before jax is imported
    from trainers.options import RunOptions, parse, prepare_jax

    if rest[:2] == ["--data", "help"]:
        from trainers.run import recipe_module

        for field, meaning in recipe_module(name).fields().items():
            print(f"{field:12}  {meaning}")
        return 0
    early = {k: rest[rest.index(k) + 1] for k in ("--devices", "--platform") if k in rest[:-1]}
    prepare_jax(early.get("--platform"))
    from trainers.run import recipe_module, train

    recipe, options = parse(recipe_module(name).Recipe, RunOptions, rest, f"zoo train {name}")
    workdir = Path(options.workdir or Path("runs") / name)
    settings, init, source = options.settings(), *options.initialiser()
    try:
        summary = train(
            name, recipe, workdir, settings,
            keep=options.keep, progress=options.progress, init=init, initialised_from=source,
        )  # fmt: skip
    except UserError:
        raise
    if summary.get("already"):
        print(f"{workdir}: this run is complete; evaluate it with: zoo eval {workdir}", file=sys.stderr)
    if summary.get("summary"):
        print(summary["summary"])
    pictures = ", ".join(sorted(str(p) for p in workdir.glob("*.png") if not p.name.startswith(".")))
    print(f"{workdir}/model holds the model; pictures: {pictures or 'none'}")
    return 0


def _eval(argv: list[str]) -> int:
    (folder,), o = _options(argv, "usage: zoo eval D [--json]", ("json",), names=1)
    from trainers.options import prepare_jax

    prepare_jax(None)
    from trainers.evaluate_run import evaluate_folder

    with contextlib.redirect_stdout(sys.stderr):
        found = evaluate_folder(Path(folder))
    if o["json"]:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{found['method']} from {found['folder']} ({found['weights']})")
    for k, v in found["metrics"].items():
        print(f"  {k:40} {v:.6g}")
    return 0


# ------------------------------------------------------------------------------------------------ claim and bench


def _claim(argv: list[str]) -> int:
    usage = "usage: zoo claim NAME [--seeds N] [--output DIR] [--json]"
    (name,), o = _options(argv, usage, ("json",), ("seeds", "output"), names=1)
    import zoo

    card = zoo.card(name)
    seeds = _count(o["seeds"], "seeds", card.claim.seeds)
    from trainers.options import prepare_jax

    prepare_jax(None)
    from trainers import claims

    with contextlib.redirect_stdout(sys.stderr):
        found = claims.run_claim(card, seeds, lambda text: print(text, flush=True))
        folder = Path(o["output"] or "runs/claims")
        claims.store(found, folder)
    if o["json"]:
        print(json.dumps(found, indent=1))
    else:
        print(claims.table(found))
        print(f"kept in {folder / name}.json, drawn in {folder / name}.png")
    return 0


def _bench(argv: list[str]) -> int:
    (name,), o = _options(argv, "usage: zoo bench NAME|trainer [--json]", ("json",), names=1)
    if name != "trainer":
        import zoo

        zoo.card(name)
    from trainers.options import prepare_jax

    prepare_jax(None)
    from trainers import bench

    with contextlib.redirect_stdout(sys.stderr):
        rows = bench.trainer() if name == "trainer" else bench.method(name)
    print(json.dumps(rows, indent=1) if o["json"] else bench.table(rows))
    return 0


def _new(argv: list[str]) -> int:
    (name,), o = _options(argv, "usage: zoo new NAME --family F [--root DIR]", (), ("family", "root"), names=1)
    from trainers.scaffold import write_method

    for file in write_method(name, o["family"], Path(o["root"] or ".")):
        print(file)
    return 0


def capture_parser_errors(parse):
    """Runs a tyro parser; its boxed error text becomes one UserError line."""
    from trainers.errors import UserError

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return parse()
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip(" │|╭╮╰╯─") for line in errors.getvalue().splitlines()]
        lines = [line for line in lines if line and not set(line) <= set("-─ ")]
        text = " ".join(lines[1:] or lines)
        text = re.sub(r"\(default: [^)]*\)|\(optional\)", "", text)
        raise UserError(text.replace("Perhaps you meant:", "; did you mean")) from None


if __name__ == "__main__":
    main()
