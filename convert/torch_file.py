"""Read the tensors of a PyTorch checkpoint without PyTorch, and without trusting the file.

`torch.save` writes a zip archive: `data.pkl`, a pickle that describes the saved object, and one uncompressed member of
raw bytes per tensor storage. A pickle is a program that imports and calls what it names. Restricting the names that
`pickle.Unpickler` may import is not enough for files from strangers: a deeply nested dictionary key still crashes the
process, a shared one hashes forever, and nine bytes can claim gigabytes of memo. So `_unpickle` interprets the opcodes
itself and turns every object into an inert value; nothing that the file names is imported, looked up or called.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import pickletools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from msvmamba_jax.errors import InputError

# The entries of a training checkpoint that are state dicts of a model; its optimiser and the rest are left alone.
_SECTIONS = ("model", "model_ema", "state_dict", "ema_state_dict", "state_dict_ema")

_DTYPES = {
    name: np.dtype(dtype)
    for dtype, *names in [
        (np.float32, "torch.FloatStorage", "torch.float32", "F32"),
        (np.float64, "torch.DoubleStorage", "torch.float64", "F64"),
        (np.float16, "torch.HalfStorage", "torch.float16", "F16"),
        (ml_dtypes.bfloat16, "torch.BFloat16Storage", "torch.bfloat16", "BF16"),
        (np.int64, "torch.LongStorage", "torch.int64", "I64"),
        (np.int32, "torch.IntStorage", "torch.int32", "I32"),
        (np.int16, "torch.ShortStorage", "torch.int16", "I16"),
        (np.int8, "torch.CharStorage", "torch.int8", "I8"),
        (np.uint8, "torch.ByteStorage", "torch.uint8", "U8", "torch.storage.UntypedStorage"),
        (np.uint16, "torch.uint16", "U16"),
        (np.uint32, "torch.uint32", "U32"),
        (np.uint64, "torch.uint64", "U64"),
        (np.bool_, "torch.BoolStorage", "torch.bool", "BOOL"),
    ]
    for name in names
}


@dataclass(frozen=True)
class StateFile:
    """The model tensors of one checkpoint file.

    Attributes:
      tensors_by_section: the state dicts found, by their name in the file: "model" and "model_ema" in VMamba and
        MSVMamba files, "state_dict" in those of mmdetection and mmsegmentation, "" for a file that is one state dict.
        Each maps parameter names to arrays in PyTorch's layout and in the stored dtype (bfloat16 is that of ml_dtypes).
        The arrays are read-only; tensors that share storage in the file share memory here, and strides are kept.
      sha256: hexadecimal digest of the whole file.
    """

    tensors_by_section: dict[str, dict[str, np.ndarray]]
    sha256: str


def read_state_file(path: str | os.PathLike[str]) -> StateFile:
    """Reads the state dicts in a PyTorch (1.6 or newer) or safetensors file; no code in the file is run.

    The prefix `module.` of DistributedDataParallel is removed where all names of a section have it. Entries that are
    not tensors are left out, and so is all that is not a model's state dict, such as the optimizer's state.

    Args:
      path: the file; its content decides how it is read, whatever its name.

    Returns:
      The tensors by section and name, and the digest of the file. There is at least one section, and none is empty.

    Raises:
      InputError: there is no such file, it is damaged, of another kind or in PyTorch's format from before 1.6, or it
        holds no tensors; the message is one sentence that names the file and, where possible, the way out.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if path.is_dir():
            raise InputError(f"{path} is a directory, not a checkpoint file")
        if not path.is_file():
            raise InputError(f"{path} is not a regular file")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return StateFile(_read_sections(path, file), sha256)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # on hostile bytes zipfile, pickletools, NumPy and the code below raise almost anything
        raise InputError(f"{path} is truncated or damaged: download or copy it again") from error


def _read_sections(path: Path, file: BinaryIO) -> dict[str, dict[str, np.ndarray]]:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(1024)
    file.seek(0)
    if not head:
        raise InputError(f"{path} is empty: download or copy it again")
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(path, file, size)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return _read_safetensors(path, file)
    raise InputError(f"{path} {_what_else(head, path.suffix)}")


def _what_else(head: bytes, suffix: str) -> str:
    """Says what a file is that begins with `head` and is none of the kinds we read, and what to do about it."""
    if b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." in head[:32]:  # torch.serialization.MAGIC_NUMBER, pickled
        return (
            "is in PyTorch's format from before version 1.6: with PyTorch, re-save it by "
            'torch.save(torch.load("old.pth", map_location="cpu", weights_only=False), "new.pth")'
        )
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return (
            "is a web page, not a checkpoint: the download link led to a warning or login page, so open it in a browser"
        )
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the checkpoint itself: run git lfs pull"
    if not head.translate(None, bytes(range(32, 256)) + b"\t\n\f\r"):
        return "is a text file, not a checkpoint: download it again"
    if suffix == ".safetensors":
        return "is not a safetensors file or is damaged: download or copy it again"
    return "is not a PyTorch checkpoint (a file by torch.save or safetensors is expected)"


# Safetensors


def _read_safetensors(path: Path, file: BinaryIO) -> dict[str, dict[str, np.ndarray]]:
    tensors = {}
    # Not safetensors.numpy.load: which dtypes that one knows depends on its version.
    for name, entry in safetensors.deserialize(file.read()):
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"{path} holds {name[:99]!r} in the type {entry['dtype']}, which is not supported")
        tensors[name] = _read_only(np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"]))
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    return {"": _strip_module(tensors)}


# PyTorch


def _read_torch(path: Path, file: BinaryIO, size: int) -> dict[str, dict[str, np.ndarray]]:
    archive = _Archive(path, file, size)
    root = _unpickle(archive.read("data.pkl"))
    sections = {}
    if isinstance(root, _Object):
        named = {name: root[name] for name in root if name in _SECTIONS}
        sections = archive.load_sections(named) or archive.load_sections({"": root})
    if not sections:
        raise InputError(
            f"{path} holds no named tensors: save the model's state_dict(), not the model or anything else"
        )
    return sections


class _Archive:
    """The zip archive that torch.save writes: what it describes, and the bytes of its storages."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self._path, self._file = path, file
        self._storages: dict[str, bytes] = {}
        with zipfile.ZipFile(file) as archive:
            self._members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise InputError(f"{path} is a zip archive, but not one by torch.save")
        self._folder = pickles[0].removesuffix("data.pkl")
        if self._folder + "constants.pkl" in self._members:
            raise InputError(f"{path} is a TorchScript archive: save the model's state_dict() with torch.save instead")
        # torch.save never compresses: members that claim more bytes than the file has are a zip bomb or damage.
        members = self._members.values()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise InputError(f"{path} has compressed members, which torch.save never writes: get the original file")
        if sum(member.file_size for member in members) > size:
            raise InputError(f"{path} has members larger than the file: download or copy it again")
        if self._folder + "byteorder" in self._members and self.read("byteorder") != b"little":
            raise InputError(f"{path} is from a big-endian machine: re-save it with PyTorch on a little-endian one")

    def read(self, name: str) -> bytes:
        """Returns the bytes of one member (and not by `ZipFile.read`, which takes the checksum 0 for damage)."""
        member = self._members[self._folder + name]
        self._file.seek(member.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", self._file.read(30))
        self._file.seek(name_length + extra_length, os.SEEK_CUR)
        content = self._file.read(member.file_size)
        # torch.serialization.set_crc32_options(False) leaves all checksums 0.
        if signature != b"PK\x03\x04" or member.CRC not in (0, zlib.crc32(content)):
            raise zipfile.BadZipFile(f"bad member {name!r}")
        return content

    def load_sections(self, state_dicts: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
        """Loads the tensors of those of the `state_dicts` that have any."""
        sections = {}
        for section, state_dict in state_dicts.items():
            tensors = {}
            for name, value in state_dict.items() if isinstance(state_dict, _Object) else ():
                if isinstance(value, _Tensor):
                    tensors[name] = self._load_tensor(name, value)
                elif isinstance(value, _Object) and value.kind.startswith("torch._utils._rebuild_"):
                    raise self._unsupported(name, value.kind)  # sparse, quantised, ...: not to be dropped in silence
            if tensors:
                sections[section] = _strip_module(tensors)
        return sections

    def _load_tensor(self, name: str, tensor: _Tensor) -> np.ndarray:
        storage, offset, shape, strides = tensor.storage, tensor.offset, tensor.shape, tensor.strides
        if tensor.kind not in _DTYPES or storage.kind not in _DTYPES:
            raise self._unsupported(name, tensor.kind)
        if storage.key not in self._storages:
            # Any text may be the key: it is only looked up among the members, never on the disk.
            self._storages[storage.key] = self.read(f"data/{storage.key}")
        content = self._storages[storage.key]
        dtype = _DTYPES[tensor.kind]
        complete = storage.numel * _DTYPES[storage.kind].itemsize <= len(content)
        if not complete or not _fits(offset, shape, strides, len(content) // dtype.itemsize):
            raise InputError(
                f"{self._path} is damaged or saved without contiguous(): {name[:99]!r} does not fit into its storage"
            )
        if 0 in shape:
            return _read_only(np.zeros(shape, dtype))
        steps = [stride * dtype.itemsize for stride in strides]
        return np.ndarray(shape, dtype, content, offset * dtype.itemsize, steps)

    def _unsupported(self, name: str, kind: str) -> InputError:
        return InputError(f"{self._path} holds {name[:99]!r} as {kind[:99]!r}, which is not supported")


def _fits(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], count: int) -> bool:
    """Tells whether a tensor lies in a storage of `count` elements, in integers that cannot overflow as NumPy's do.

    One with more elements than its storage (expanded, stride 0) does not: no parameter is, and it can claim terabytes.
    """
    if len(shape) != len(strides) or len(shape) > 32:
        return False
    if not all(isinstance(n, int) and 0 <= n < 2**48 for n in (offset, *shape, *strides)):
        return False
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    return 0 in shape or (math.prod(shape) <= count and last < count)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _strip_module(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


# The pickle

# The opcodes whose argument is the value itself: pickletools knows the type of what they push.
_LITERALS = {
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg and opcode.stack_after not in ([], [pickletools.anyobject])
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Object(dict[str, Any]):
    """Stands for a dictionary, a list or an instance of any class: what it holds under text keys, and no behaviour."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _Global:
    """A class or function that the pickle names."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as the file describes it: checked and loaded only if it belongs to a model."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: str


def _unpickle(data: bytes) -> object:
    """Runs a pickle (protocols 2 to 5) on inert values; raises whatever the first impossible step leads to."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case name if name in _LITERALS:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                length = int(name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "GLOBAL":
                stack.append(_Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack[-2:] = [_Global(".".join(stack[-2:]))]
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [_construct(*stack[-2:])]
            case "NEWOBJ_EX":
                stack[-3:] = [_construct(*stack[-3:-1])]
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_SET" as name:
                stack.append(_Object(name))
            case "FROZENSET" as name:
                pop_to_mark()
                stack.append(_Object(name))
            case "SETITEM" | "SETITEMS" as name:
                if name == "SETITEM":
                    marks.append(len(stack) - 2)
                items = pop_to_mark()
                pairs = zip(items[::2], items[1::2], strict=True)
                # Only text: a nested tuple as the key could take forever to hash, and no tensor is found by one.
                stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))
            case "APPEND" | "BUILD" | "POP":  # the items of a list and the state of an object are dropped
                stack.pop()
            case "APPENDS" | "ADDITEMS" | "POP_MARK":
                pop_to_mark()
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case name:
                raise pickle.UnpicklingError(f"opcode {name}")
    raise pickle.UnpicklingError("no end")


def _construct(function: object, arguments: Any) -> object:
    """Stands for the call of a global: tensors are described, all else becomes an inert object."""
    name = function.name if isinstance(function, _Global) else ""
    match name:
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
            storage, offset, shape, strides, *_ = arguments
            return _Tensor(storage, offset, shape, strides, storage.kind)
        case "torch._utils._rebuild_tensor_v3":  # types younger than the typed storages: the storage is plain bytes
            storage, offset, shape, strides, _, _, dtype, *_ = arguments
            return _Tensor(storage, offset, shape, strides, dtype.name)
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" | "torch.Size":
            return arguments[0]
        case "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes: (function, type, arguments, state)
            return _construct(arguments[0], arguments[2])
    return _Object(name)


def _storage(persistent_id: object) -> _Storage:
    match persistent_id:
        case ("storage", _Global(name), str() as key, _, int() as numel):
            return _Storage(name, key, numel)
    raise pickle.UnpicklingError("bad persistent id")
