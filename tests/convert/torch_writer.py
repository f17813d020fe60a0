"""Write files in the format of torch.save (PyTorch 2.13) without PyTorch, down to its pickle opcodes and zip padding.

Also writes what torch.save never would: calls of any function, raw opcodes, members of any content.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES = {
    np.dtype(dtype): name
    for dtype, name in [
        (np.float32, "FloatStorage"),
        (np.float64, "DoubleStorage"),
        (np.float16, "HalfStorage"),
        (ml_dtypes.bfloat16, "BFloat16Storage"),
        (np.int64, "LongStorage"),
        (np.int32, "IntStorage"),
        (np.int16, "ShortStorage"),
        (np.int8, "CharStorage"),
        (np.uint8, "ByteStorage"),
        (np.bool_, "BoolStorage"),
        (np.complex64, "ComplexFloatStorage"),
    ]
}


@dataclass
class Parameter:
    """An array to be written as a torch.nn.Parameter."""

    data: np.ndarray


@dataclass(frozen=True)
class Global:
    """A class or function, by name."""

    module: str
    name: str


@dataclass
class Instance:
    """What `target(*arguments)` returns, made by REDUCE or (`new`) NEWOBJ, then given items and a state."""

    target: Global
    arguments: tuple[Any, ...] = ()
    new: bool = False
    items: dict[Any, Any] = field(default_factory=dict)
    appended: list[Any] = field(default_factory=list)
    state: Any = None


@dataclass
class PersistentId:
    """The object that stands behind a persistent id."""

    value: Any


@dataclass
class Raw:
    """Opcodes that push one object."""

    opcodes: bytes


def tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Instance:
    """A tensor as torch.save describes it, from parts that need not fit together."""
    return Instance(
        Global("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, Instance(_ORDERED_DICT))
    )


def storage(key: Any, numel: Any, kind: str = "FloatStorage") -> PersistentId:
    """A reference to the archive's member `data/<key>`."""
    return PersistentId(("storage", Global("torch", kind), key, "cpu", numel))


_ORDERED_DICT = Global("collections", "OrderedDict")


class _Pickler:
    """Encodes as CPython does with protocol 2; arrays become tensors, and views of one array share its storage."""

    def __init__(self) -> None:
        self.storages: list[np.ndarray] = []
        self._out = bytearray()
        self._memo: dict[Any, int] = {}
        self._kept: list[Any] = []  # an id must not be reused while the memo holds it

    def dumps(self, obj: Any) -> bytes:
        self._out += b"\x80\x02"
        self._save(obj)
        return bytes(self._out + b".")

    def _put(self, key: Any) -> None:
        index = self._memo[key] = len(self._memo)
        self._out += b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index)

    def _save(self, obj: Any) -> None:
        # Python interns names, so equal strings are mostly one object; tuples and numbers are taken as they come.
        key = obj if isinstance(obj, str | Global) else id(obj)
        if key in self._memo:
            index = self._memo[key]
            self._out += b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)
            return
        self._kept.append(obj)
        match obj:
            case Raw():
                self._out += obj.opcodes
            case None:
                self._out += b"N"
            case bool():
                self._out += b"\x88" if obj else b"\x89"
            case int() if -(2**31) <= obj < 2**31:
                self._out += (
                    struct.pack("<cB", b"K", obj)
                    if 0 <= obj < 256
                    else struct.pack("<cH", b"M", obj)
                    if 0 <= obj < 65536
                    else struct.pack("<ci", b"J", obj)
                )
            case int():
                content = obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True)
                self._out += b"\x8a" + bytes([len(content)]) + content
            case float():
                self._out += b"G" + struct.pack(">d", obj)
            case str():
                content = obj.encode("utf-8", "surrogatepass")
                self._out += b"X" + struct.pack("<I", len(content)) + content
                self._put(key)
            case Global():
                self._out += f"c{obj.module}\n{obj.name}\n".encode()
                self._put(key)
            case tuple() if not obj:
                self._out += b")"
            case tuple():
                self._out += b"(" if len(obj) > 3 else b""
                for item in obj:
                    self._save(item)
                self._out += [b"\x85", b"\x86", b"\x87", b"t"][min(len(obj), 4) - 1]
                self._put(key)
            case list():
                self._out += b"]"
                self._put(key)
                self._append(obj)
            case OrderedDict():
                self._save(Instance(_ORDERED_DICT, items=dict(obj), state=vars(obj) or None))
            case dict():
                self._out += b"}"
                self._put(key)
                self._set_items(obj)
            case np.ndarray() | np.generic():
                self._save(self._tensor(np.asarray(obj)))
            case Parameter():
                self._save(
                    Instance(
                        Global("torch._utils", "_rebuild_parameter"), (self._tensor(obj.data), True, OrderedDict())
                    )
                )
            case PersistentId():
                self._save(obj.value)
                self._out += b"Q"
            case Instance():
                self._save(obj.target)
                self._save(obj.arguments)
                self._out += b"\x81" if obj.new else b"R"
                self._put(key)
                self._append(obj.appended)
                self._set_items(obj.items)
                if obj.state is not None:
                    self._save(obj.state)
                    self._out += b"b"
            case _:
                raise TypeError(f"cannot write {type(obj)}")

    def _append(self, items: list[Any]) -> None:
        for start in range(0, len(items), 1000):
            batch = items[start : start + 1000]
            self._out += b"(" if len(batch) > 1 else b""
            for item in batch:
                self._save(item)
            self._out += b"e" if len(batch) > 1 else b"a"

    def _set_items(self, items: dict[Any, Any]) -> None:
        pairs = list(items.items())
        for start in range(0, len(pairs), 1000):
            batch = pairs[start : start + 1000]
            self._out += b"(" if len(batch) > 1 else b""
            for name, value in batch:
                self._save(name)
                self._save(value)
            self._out += b"u" if len(batch) > 1 else b"s"

    def _tensor(self, array: np.ndarray) -> Instance:
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        key = next((key for key, known in enumerate(self.storages) if known is base), len(self.storages))
        if key == len(self.storages):
            self.storages.append(base)
        address = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        offset = address // base.itemsize if array.size else 0
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return tensor(storage(str(key), base.size, _STORAGES[base.dtype]), offset, array.shape, strides)


def dumps(obj: Any) -> tuple[bytes, dict[str, bytes]]:
    """Returns the pickle and the storages' bytes of `obj`: numbers, text, containers, arrays and the classes above."""
    pickler = _Pickler()
    pickled = pickler.dumps(obj)
    return pickled, {str(key): base.tobytes(order="A") for key, base in enumerate(pickler.storages)}


def members(obj: Any, folder: str = "archive", extra: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """Returns the archive's members for `obj` in torch.save's order; `extra` adds some or replaces their content."""
    pickled, storages = dumps(obj)
    contents = {
        "data.pkl": pickled,
        ".format_version": b"1",
        ".storage_alignment": b"64",
        "byteorder": b"little",
        **{f"data/{key}": content for key, content in storages.items()},
        "version": b"3\n",
        ".data/serialization_id": b"0123456789012345678901234567890123456789",
    }
    return {f"{folder}/{name}": content for name, content in (contents | (extra or {})).items()}


def write_zip(
    path: str | os.PathLike[str], contents: dict[str, bytes], *, deflate: bool = False, crc: bool = True
) -> None:
    """Writes a zip archive as PyTorch does: contents aligned to 64 bytes, sizes after each, a zip64 directory."""
    out, directory = bytearray(), bytearray()
    for name, content in contents.items():
        encoded = name.encode()
        checksum = zlib.crc32(content) if crc else 0
        stored = zlib.compress(content, wbits=-15) if deflate else content
        sizes = struct.pack("<III", checksum, len(stored), len(content))
        method = struct.pack("<H", 8 if deflate else 0)
        padding = -(len(out) + 30 + len(encoded) + 4) % 64
        offset = len(out)
        out += b"PK\3\4" + struct.pack("<HH", 0, 0x808) + method + bytes(16)
        out += (
            struct.pack("<HH", len(encoded), padding + 4)
            + encoded
            + b"FB"
            + struct.pack("<H", padding)
            + b"Z" * padding
        )
        out += stored + b"PK\7\10" + sizes
        directory += b"PK\1\2" + struct.pack("<HHH", 0, 0, 0x808) + method + bytes(4) + sizes
        directory += struct.pack("<HHHHHII", len(encoded), 0, 0, 0, 0, 0, offset) + encoded
    count, start, size = len(contents), len(out), len(directory)
    end = start + size
    out += directory
    out += b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 0x31E, 45, 0, 0, count, count, size, start)
    out += b"PK\6\7" + struct.pack("<IQI", 0, end, 1)
    out += b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, size, start, 0)
    Path(path).write_bytes(out)


def write(
    path: str | os.PathLike[str], obj: Any, *, folder: str | None = None, extra: dict[str, bytes] | None = None
) -> None:
    """Writes `obj` to `path` as torch.save would."""
    write_zip(path, members(obj, folder or Path(path).stem, extra))
