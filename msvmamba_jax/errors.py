"""The one exception that means: what the user gave cannot be used, and the message says why and what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


class InputError(ValueError):
    """A file, option or value from outside is missing, damaged or does not fit.

    The message is one sentence for a person. The commands print it without a traceback and exit with status 1; every
    other exception is a defect of this package and keeps its traceback.
    """


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within it, what the system refuses is a mistake of the person who wants `path` written.

    Raises:
        InputError: in the place of an OSError, with its reason.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {os.fspath(path)}: {error.strerror or error}") from error
