"""Large JSON files in COCO's form, read element by element.

COCO's training annotations are half a gigabyte of text and several as Python objects. Here only the places of the list
elements in the file are kept, and an element is read again when it is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from msvmamba_jax.errors import InputError

Visitor = Callable[[Any, int, int], None]  # an element, and where its bytes begin and end

_SPACE = re.compile(r"[ \t\n\r]*")


@dataclasses.dataclass(frozen=True)
class JsonFile:
    """A JSON file as it was when `scan_lists` read it.

    Attributes:
        path: of the file.
        size: in bytes.
        modified: time of the last change, in nanoseconds.
    """

    path: str
    size: int
    modified: int

    def read(self, spans: np.ndarray) -> list[Any]:
        """Reads elements again.

        Args:
            spans: int64 (n, 2), where they begin and end in the file, as `scan_lists` says.

        Raises:
            InputError: the file cannot be read, or has changed since.
        """
        try:
            with open(self.path, "rb") as file:
                if _stamp(file.fileno()) != (self.size, self.modified):
                    raise InputError(f"The file {self.path} has changed since it was read: start again.")
                elements = []
                for begin, end in spans.tolist():
                    file.seek(begin)
                    elements.append(json.loads(file.read(end - begin)))
                return elements
        except OSError as error:
            raise InputError(f"Cannot read {self.path}: {error.strerror or error}.") from error


def scan_lists(path: str, visitors: Mapping[str, Visitor]) -> JsonFile:
    """Reads lists of the object that a JSON file holds, such as {"images": [...], "annotations": [...]}.

    Args:
        path: of the file, in UTF-8.
        visitors: for the name of each list what is called with its elements, in their order. Lists come in the order of
            the file; other members are passed over.

    Returns:
        What reads the elements again.

    Raises:
        InputError: the file cannot be read, is cut off or no such JSON, or lacks one of the lists; and what the
            visitors raise.
    """
    try:
        # A character for every byte, so that positions are those of the file. JSON's own signs are ASCII in UTF-8.
        with open(path, encoding="latin-1", newline="") as file:
            stamp = _stamp(file.fileno())
            text = file.read()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    scanner = _Scanner(text, 3 if text.startswith("\xef\xbb\xbf") else 0)  # the mark of UTF-8 that Windows writes
    ascii_only = text.isascii()
    seen = set()
    try:
        for _ in scanner.sequence("{", "}"):
            name = scanner.value()
            scanner.take(":")
            if not isinstance(name, str):
                raise ValueError
            if name not in visitors:
                scanner.value()
                continue
            if name in seen:
                raise InputError(f"The file {path} has two lists {name!r}: leave one.")
            seen.add(name)
            for _ in scanner.sequence("[", "]"):
                scanner.token()
                begin = scanner.position
                element = scanner.value()
                if not ascii_only and not (segment := text[begin : scanner.position]).isascii():
                    element = json.loads(segment.encode("latin-1"))
                visitors[name](element, begin, scanner.position)
        if scanner.token():
            raise ValueError
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"The file {path} is cut off or no JSON in COCO's form (byte {scanner.position} of {len(text)}): copy or "
            "export it again."
        ) from error
    if missing := [name for name in visitors if name not in seen]:
        raise InputError(f"The file {path} has no list {missing[0]!r}: it must hold {', '.join(map(repr, visitors))}.")
    return JsonFile(path, *stamp)


class _Scanner:
    """Walks through JSON text; a `ValueError` is raised where it is no JSON."""

    def __init__(self, text: str, position: int):
        self.position = position
        self._text = text
        self._decode = json.JSONDecoder().raw_decode

    def token(self) -> str:
        """Passes over white space; returns the character there, "" at the end."""
        match = _SPACE.match(self._text, self.position)
        assert match is not None
        self.position = match.end()
        return self._text[self.position : self.position + 1]

    def take(self, expected: str) -> None:
        if self.token() != expected:
            raise ValueError
        self.position += 1

    def value(self) -> Any:
        self.token()
        value, self.position = self._decode(self._text, self.position)
        return value

    def sequence(self, opening: str, closing: str) -> Iterator[None]:
        """Stops before each member, which the caller takes."""
        self.take(opening)
        if self.token() != closing:
            yield
            while self.token() != closing:
                self.take(",")
                yield
        self.take(closing)


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
