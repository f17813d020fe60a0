"""What all commands share: how errors reach the person at the terminal."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging

from msvmamba_jax.errors import InputError


def run(main: Callable[[], int | None]) -> int:
    """Runs a command; what a person can mend becomes one sentence on standard error.

    Returns:
        The exit status: what `main` returns (None: 0), 1 after an error, 130 after Ctrl-C.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax and JAX report every file and every absent accelerator
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = _storage_problem(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
    return 1


def run_with_config(main: Callable[[], int | None]) -> None:
    """Runs a command whose arguments are absl flags with an ml_collections configuration; does not return."""

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(arguments)
            if len(rest) > 1:
                raise InputError(f"unexpected argument {rest[1]!r}; options start with --")
            return rest
        except (InputError, flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            # a configuration file that is missing or broken, an unknown key, or a value of another type
            text = " ".join(str(error.args[0] if error.args else error).split())
            print(f"error: {text} (--help lists the options)", file=sys.stderr)
            sys.exit(1)

    app.run(lambda _: sys.exit(run(main)), flags_parser=parse)


def _storage_problem(error: BaseException) -> str | None:
    """A sentence if `error`, or one it comes from, says that something could not be stored."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            place = f" while writing {cause.filename}" if cause.filename else ""
            return f"the disk is full{place}: free some space and run the same command again"
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission to write{f' {cause.filename}' if cause.filename else ''} ({cause.strerror})"
        if "No space left on device" in str(cause) or "RESOURCE_EXHAUSTED: Error writing" in str(cause):
            return "the disk is full: free some space and run the same command again"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
