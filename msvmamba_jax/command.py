"""What all commands share: how errors reach the person at the terminal."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from msvmamba_jax.errors import InputError, writing


def run(main: Callable[[], int | None]) -> int:
    """Runs a command; what a person can mend becomes one sentence on standard error.

    Returns:
        The exit status: what `main` returns (None: 0), 1 after an error, 130 after Ctrl-C.
    """
    # Orbax and JAX tell of every file and absent accelerator; what fails reaches the code below as an exception.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("msvmamba_jax").setLevel(logging.WARNING)  # or the line above would silence this package too
    sys.unraisablehook = _report_unraisable
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of a failed save, one traceback for each array
    try:
        status = main() or 0
        sys.stdout.flush()  # what cannot be written is to fail here, not when the interpreter ends
        return status
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output, such as `head`, has enough
        _discard_output()
    except Exception as error:
        message = _missing_key(error) or _storage_problem(error) or _memory_problem(error) or _platform_problem(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        _discard_output()
    return 1


def run_with_config(main: Callable[[], int | None]) -> None:
    """Runs a command whose arguments are absl flags with an ml_collections configuration; does not return."""

    def parse(arguments: Sequence[str]) -> list[str]:
        if "--help" in arguments:  # absl's own ends with status 1
            app.usage(shorthelp=True, writeto_stdout=True)
            sys.exit(0)
        try:
            rest = flags.FLAGS(arguments)
            if len(rest) > 1:
                raise InputError(f"unexpected argument {rest[1]!r}; options start with --")
            flags.FLAGS.config.keys()  # that a file is missing shows only when it is used
            return rest
        except Exception as error:  # a configuration file runs as Python and can raise anything
            print(f"error: {_flag_problem(error)} (--help lists the options)", file=sys.stderr)
            sys.exit(1)

    app.run(lambda _: sys.exit(run(main)), flags_parser=parse)


def _flag_problem(error: Exception) -> str:
    reason = error.args[0] if error.args else error
    if isinstance(reason, KeyError):  # how ml_collections tells of an unknown key, with a suggestion on a second line
        return f"the configuration has no key {'. '.join(str(reason.args[0]).splitlines())}"
    if isinstance(error, OSError):  # its last line has the system's reason
        last = str(error).splitlines()[-1].rpartition("failure to load: ")[2]
        return f"cannot load the configuration: {last.strip()}"
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return "the configuration has no get_config(): name one such as configs/tiny.py"
    if isinstance(error, (SyntaxError, ImportError, NameError)):
        return f"the configuration is no working Python: {error}"
    return " ".join(str(reason).split())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as lines for a terminal: names to the left, fractions in per cent, None as a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.2%}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in lines)


def check_writable(path: str | Path) -> None:
    """Checks before long work that a file can be written when it is done.

    Raises:
        InputError: there is no such folder, it is a folder itself, or it may not be written.
    """
    path = Path(path).absolute()
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: no permission")


def write_json(path: str | Path, values: Any) -> None:
    """Writes a file for the person who asked for it.

    Raises:
        InputError: it cannot be written.
    """
    with writing(path):
        Path(path).write_text(json.dumps(values, indent=2) + "\n")


def _discard_output() -> None:
    """Sends what is left for standard output nowhere: the interpreter writes it when it ends, and would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_unraisable(problem: Any) -> None:
    """As Python does, but for what TensorStore's threads still had to say to a reader that failed."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


def _missing_key(error: BaseException) -> str | None:
    """A sentence if a key was read that the configuration does not have."""
    trace = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, (AttributeError, KeyError)) or not trace or "ml_collections" not in trace[-1].filename:
        return None
    key = str(error.args[0] if error.args else error).splitlines()[0].strip("\"'")
    return f"the configuration has no key {key!r}: compare it with the files of configs/"


def _storage_problem(error: BaseException) -> str | None:
    """A sentence if `error`, or one it comes from, says that something could not be stored."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            place = f" while writing {cause.filename}" if cause.filename else ""
            return f"the disk is full{place}: free some space and run the same command again"
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no access{f' to {cause.filename}' if cause.filename else ''}: {cause.strerror}"
        if "No space left on device" in str(cause) or "RESOURCE_EXHAUSTED: Error writing" in str(cause):
            return "the disk is full: free some space and run the same command again"
    return None


def _memory_problem(error: BaseException) -> str | None:
    """A sentence if the device ran out of memory."""
    message = str(error)
    if "RESOURCE_EXHAUSTED: Out of memory" not in message:
        return None
    asked = re.search(r"allocate ([\d.]+ ?[KMGT]?i?B)", message)
    return (
        f"the device ran out of memory{f' (asked for {asked[1]} at once)' if asked else ''}: use a smaller batch; for "
        "training, config.accumulate=2 works a batch through in two parts, and config.remat=True keeps less of blocks"
    )


def _platform_problem(error: BaseException) -> str | None:
    """A sentence if JAX was asked for a kind of device that it cannot use."""
    trace = traceback.extract_tb(error.__traceback__)
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms or not trace or Path(trace[-1].filename).name != "xla_bridge.py":
        return None
    return f"JAX can use no device for JAX_PLATFORMS={platforms}: install JAX for it (see README.md), or unset it"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
