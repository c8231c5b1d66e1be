"""``cachedit run``: a script that says ``import cache_dit`` runs on this package."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from .. import alias


def run(script: str, arguments: Sequence[str]) -> int:
    """Run a script as ``python script arguments...`` would, with ``cache_dit`` standing for this package.

    Returns:
        The exit code: what the script gave to ``sys.exit``, 1 after an exception (printed), 130 after an interrupt.
    """
    alias.install(override=True)
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # python -P adds no folder to the path
        sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        return _exit_code(leaving)
    except BaseException as error:
        error.__traceback__ = _within(script, error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


def _within(script: str, traceback: TracebackType | None) -> TracebackType | None:
    """Leave out the frames that lead to the script; all are kept where none is the script's (a syntax error)."""
    frame = traceback
    while frame is not None and frame.tb_frame.f_code.co_filename != script:
        frame = frame.tb_next
    return frame or traceback
