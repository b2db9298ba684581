"""Errors the user can mend, and the nearest right names to a wrong one.  Imports nothing heavy."""

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend: printed as one line, exit status 2, no traceback."""


class Diverged(Exception):
    """A metric became non-finite; the message names the step, the phase and the metric."""


class Interrupted(Exception):
    """The run was asked to stop; the message says whether its state is saved."""

    exit_status = 130


def nearest(name: str, known: Sequence[str]) -> str:
    """``did you mean ...?``, or the list of known names if none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
