"""The reader of PyTorch files: right values from good files, one clear sentence for bad ones, no harm from hostile."""

from __future__ import annotations

import collections
import datetime
import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_writer
from torch_writer import Global, Instance, Parameter, PersistentId, Raw

from msvmamba_jax.convert.torch_file import StateFile, read_state_file
from msvmamba_jax.errors import InputError

DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def values(shape, dtype="float32", seed=0):
    array = np.asarray(np.random.default_rng(seed).normal(size=shape) * 9)
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def read(path, obj, **options):
    torch_writer.write(path, obj, **options)
    return read_state_file(path).tensors_by_section


def error_of(path) -> str:
    """Reads a bad file and returns the message, which must be one sentence that names the file."""
    with pytest.raises(InputError) as caught:
        read_state_file(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.pth"


# Good files


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_layout(path, dtype):
    base = values((4, 6), dtype)
    state = {
        "whole": base,
        "transposed": base.T,
        "slice": base[1:, 2:5],
        "steps": base[::2, ::3],
        "scalar": values((), dtype),
        "empty": values((0, 3), dtype),
        "deep": values((2, 1, 3, 1, 2), dtype).transpose(4, 2, 0, 1, 3),
        "parameter": values(5, dtype, seed=1),
    }
    tensors = read(path, state | {"parameter": Parameter(state["parameter"])})[""]
    assert_same(tensors, state)
    assert np.shares_memory(tensors["whole"], tensors["transposed"])
    assert not any(array.flags.writeable for array in tensors.values())


def test_tensor_with_attributes_and_young_dtypes(path):
    data = np.arange(6, dtype=np.uint16).reshape(2, 3)
    plain = torch_writer.tensor(torch_writer.storage("0", 3), 0, (3,), (1,))
    with_state = Global("torch._utils", "_rebuild_parameter_with_state")
    of_type = Global("torch._tensor", "_rebuild_from_type_v2")
    young = (
        PersistentId(("storage", Global("torch.storage", "UntypedStorage"), "1", "cpu", 12)),
        *(0, (2, 3), (3, 1), False, collections.OrderedDict(), Global("torch", "uint16")),
    )
    tensors = read(
        path,
        {
            "parameter": Instance(with_state, (plain, True, collections.OrderedDict(), {"_no_weight_decay": True})),
            "tensor": Instance(of_type, (plain.target, Global("torch", "Tensor"), plain.arguments, {"note": 1})),
            "uint16": Instance(Global("torch._utils", "_rebuild_tensor_v3"), young),
        },
        extra={"data/0": np.float32([1, 2, 3]).tobytes(), "data/1": data.tobytes()},
    )[""]
    assert_same(tensors, {"parameter": np.float32([1, 2, 3]), "tensor": np.float32([1, 2, 3]), "uint16": data})


def test_file_of_vmamba(path):
    model = collections.OrderedDict(weight=values((2, 3)), steps=np.array(7))
    model._metadata = collections.OrderedDict({"": {"version": 1}})
    ema = collections.OrderedDict(weight=values((2, 3), seed=1), steps=np.array(7))
    node = Global("yacs.config", "CfgNode")
    data = Instance(node, new=True, items={"IMG_SIZE": 224}, state={"__immutable__": True})
    config = Instance(node, new=True, items={"DATA": data, "BASE": [""]}, state={"__immutable__": False})
    checkpoint = {
        "model": model,
        "optimizer": {
            "state": {0: {"step": np.array(3.0), "exp_avg": values((2, 3))}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "lr_scheduler": {"warmup_t": 20, "values": [1.0, 2.0]},
        "max_accuracy": 82.75,
        "scaler": {"scale": 65536.0},
        "epoch": 299,
        "config": config,
        "model_ema": ema,
        "max_accuracy_ema": 82.5,
    }
    sections = read(path, checkpoint)
    assert list(sections) == ["model", "model_ema"]
    assert_same(sections["model"], model)
    assert_same(sections["model_ema"], ema)


def test_file_of_mmdetection(path):
    floats = Instance(Global("numpy", "dtype"), ("f8", False, True), state=(3, "<", None, None, None, -1, -1, 0))
    encoded = Instance(Global("_codecs", "encode"), ("\x00" * 16, "latin1"))
    history = Instance(
        Global("numpy.core.multiarray", "_reconstruct"),
        (Global("numpy", "ndarray"), (0,), encoded),
        state=(1, (2,), floats, False, encoded),
    )
    buffer = Instance(Global("mmengine.logging.history_buffer", "HistoryBuffer"), new=True, state={"_log": history})
    time = Instance(Global("datetime", "datetime"), (encoded,))
    recent = Instance(Global("collections", "deque"), ((), 10), appended=[1, 2, time])
    counts = Instance(Global("collections", "Counter"), ({"a": 1},))
    grouped = Instance(Global("collections", "defaultdict"), (Global("builtins", "list"),), items={3: [history]})
    state = collections.OrderedDict({"backbone.weight": values(3), "head.bias": values(2, "float64")})
    sections = read(
        path,
        {
            "meta": {"time": time, "recent": recent, "counts": counts, "grouped": grouped, "cfg": "model = dict()\n"},
            "state_dict": state,
            "message_hub": {"log_scalars": collections.OrderedDict({"train/loss": buffer})},
        },
    )
    assert list(sections) == ["state_dict"]
    assert_same(sections["state_dict"], state)


def test_prefix_of_distributed_training_goes_only_from_all_names(path):
    first, second = values(2), values(3)
    assert_same(read(path, {"module.a": first, "module.b": second})[""], {"a": first, "b": second})
    assert_same(read(path, {"module.a": first, "b": second})[""], {"module.a": first, "b": second})


def test_other_entries_of_a_state_dict_are_left_out(path):
    assert_same(
        read(path, {"a": values(2), "note": "text", 3: values(2), "_extra_state": {"x": 1}})[""], {"a": values(2)}
    )


def test_optimizer_is_not_loaded(path):
    torch_writer.write(path, {"model": {"a": values(2)}, "optimizer": {"b": values(3, seed=1)}})
    contents = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    del contents["net/data/1"]
    torch_writer.write_zip(path, contents)
    assert_same(read_state_file(path).tensors_by_section["model"], {"a": values(2)})


def test_digest(path):
    torch_writer.write(path, {"a": values(2)})
    assert read_state_file(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_state_file(str(path)).sha256 == read_state_file(path).sha256


def test_older_and_unchecked_archives(path):
    contents = torch_writer.members({"a": values(2)})
    del contents["archive/byteorder"]  # before PyTorch 2.1
    torch_writer.write_zip(path, contents)
    assert_same(read_state_file(path).tensors_by_section[""], {"a": values(2)})
    torch_writer.write_zip(path, contents, crc=False)  # torch.serialization.set_crc32_options(False)
    assert_same(read_state_file(path).tensors_by_section[""], {"a": values(2)})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_foreign_objects_of_every_protocol_are_swallowed(path, protocol):
    ring = []
    ring.append((ring, ring, ring, ring, {"ring": (ring,)}))
    foreign = {
        "standard": [datetime.datetime.now(), collections.deque([1, 2]), collections.Counter("aab"), Path("a"), 1j],
        "sets": ({1, 2}, frozenset({3}), set(), frozenset()),
        "numpy": [np.random.default_rng(0), np.arange(3), np.float64(2), np.random.RandomState(0).get_state()],
        "numbers": (0, -1, 300, 70_000, 2**40, -(2**90), 2**2100, 1.5, True, None),
        "bytes": (b"", b"a" * 300, bytearray(b"b"), "é" * 300, "\ud800"),
        "ring": ring,
        "class": zipfile.ZipInfo,
        "new_ex": Instance,
        "long": list(range(3000)),
    }
    torch_writer.write(path, {}, extra={"data.pkl": pickle.dumps(foreign, protocol)})
    assert "no named tensors" in error_of(path)  # so it got to the end


def test_names_given_through_the_stack(path):
    def text(value):
        return b"\x8c" + bytes([len(value)]) + value.encode()

    rebuild = Raw(text("torch._utils") + text("_rebuild_tensor_v2") + b"\x93")
    floats = Raw(text("torch") + text("FloatStorage") + b"\x93")
    persistent_id = PersistentId(("storage", floats, "0", "cpu", 2))
    arguments = (persistent_id, 0, (2,), (1,), False, collections.OrderedDict())
    tensors = read(path, {"a": Instance(rebuild, arguments)}, extra={"data/0": values(2).tobytes()})[""]
    assert_same(tensors, {"a": values(2)})


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    state = {dtype: values((2, 3), dtype) for dtype in sorted(DTYPES)} | {"scalar": values(()), "void": values((0, 3))}
    path.write_bytes(safetensors.numpy.save({f"module.{name}": array for name, array in state.items()}))
    file = read_state_file(path)
    assert list(file.tensors_by_section) == [""]
    assert_same(dict(sorted(file.tensors_by_section[""].items())), dict(sorted(state.items())))
    assert not any(array.flags.writeable for array in file.tensors_by_section[""].values())
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# Bad files


def test_no_file(tmp_path):
    assert "does not exist" in error_of(tmp_path / "no.pth")
    assert "is a directory" in error_of(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in error_of(tmp_path / "pipe")
    assert "cannot be read" in error_of(tmp_path / ("long" * 100))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>", "web page"),
        (b"\xef\xbb\xbf<HTML>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b'{"error": "not found"}\n', "text file"),
        ("Größe".encode(), "text file"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "re-save it by torch.save"),
        (pickle.dumps({"a": 1}), "not a PyTorch checkpoint"),
        (b"\x1f\x8b\x08\x00\x00\x00", "not a PyTorch checkpoint"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "not a PyTorch checkpoint"),
        (b"PK", "text file"),
        (b"PK\x03\x04", "truncated or damaged"),
    ],
)
def test_other_kinds_of_files(path, content, message):
    path.write_bytes(content)
    assert message in error_of(path)


def test_other_archives(path):
    np.savez(path.with_suffix(".npz"), a=values(2))
    assert "not one by torch.save" in error_of(path.with_suffix(".npz"))
    torch_writer.write(path, {"a": values(2)}, extra={"constants.pkl": b"", "code/net.py": b""})
    assert "TorchScript" in error_of(path)
    torch_writer.write(path, {"a": values(2)}, extra={"byteorder": b"big"})
    assert "big-endian" in error_of(path)
    torch_writer.write_zip(path, torch_writer.members({"a": values(2)}), deflate=True)
    assert "compressed" in error_of(path)


@pytest.mark.parametrize(
    "obj",
    [
        {},
        {"a": 1, "b": "text"},
        {"model": {}, "epoch": 3},
        [values(2)],
        3,
        values(2),
        Instance(Global("models.vmamba", "VSSM"), new=True, state={"_parameters": {"a": values(2)}}),
    ],
)
def test_no_named_tensors(path, obj):
    torch_writer.write(path, obj)
    assert "holds no named tensors" in error_of(path)


def test_empty_safetensors(path):
    path.write_bytes(safetensors.numpy.save({}))
    assert "holds no tensors" in error_of(path)


def test_unsupported_tensors_are_named(path):
    torch_writer.write(path, {"a": values(2), "wave": values(2, "complex64")})
    assert re.search("'wave' as 'torch.ComplexFloatStorage'", error_of(path))
    torch_writer.write(
        path, {"a": values(2), "few": Instance(Global("torch._utils", "_rebuild_sparse_tensor"), (1, 2))}
    )
    assert re.search("'few' as 'torch._utils._rebuild_sparse_tensor'", error_of(path))
    header = b'{"tiny": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    assert re.search("'tiny' in the type F8_E5M2", error_of(path))


# Hostile files


SHELL = Global(os.system.__module__, "system")
PAYLOADS = {
    "call": lambda command: Instance(SHELL, (command,)),
    "new": lambda command: Instance(SHELL, (command,), new=True),
    "builtin": lambda command: Instance(Global("builtins", "eval"), (f"__import__('os').system({command!r})",)),
    "through_parameter": lambda command: Instance(
        Global("torch._utils", "_rebuild_parameter"), (Instance(SHELL, (command,)), True, collections.OrderedDict())
    ),
    "through_type": lambda command: Instance(
        Global("torch._tensor", "_rebuild_from_type_v2"), (SHELL, Global("torch", "Tensor"), (command,), {})
    ),
    "state": lambda command: Instance(
        Instance(Global("builtins", "getattr"), (Global("os", "path"), "os")), (), state={"__setstate__": SHELL}
    ),
    "stack": lambda command: Instance(Raw(b"\x8c\x02os\x8c\x06system\x93"), (command,)),
    "partial": lambda command: Instance(Global("functools", "partial"), (SHELL,), state=(SHELL, (command,), {}, None)),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_in_the_file_runs(path, tmp_path, payload):
    marker = tmp_path / "marker"
    hostile = PAYLOADS[payload](f"touch {marker}")
    sections = read(path, {"before": hostile, "model": {"a": values(2), "b": hostile}, "after": [hostile]})
    assert not marker.exists()
    assert_same(sections["model"], {"a": values(2)})


def test_the_payload_is_live(tmp_path):
    """Or else the test above would show nothing."""
    marker = tmp_path / "marker"
    pickle.loads(torch_writer.dumps(PAYLOADS["call"](f"touch {marker}"))[0])
    assert marker.exists()


def test_nothing_in_the_file_is_imported(path, tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sections = read(
        path,
        {"x": Global("hostile_module", "x"), "model": {"a": values(2)}, "y": Instance(Global("hostile_module", "y"))},
    )
    assert list(sections) == ["model"]
    assert "hostile_module" not in sys.modules


GOOD = ("0", 6, 0, (2, 3), (3, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**70},
        {"offset": 1.0},
        {"offset": None},
        {"shape": (2, 4)},
        {"shape": (-2, -3)},
        {"shape": (2, 3.0)},
        {"shape": (2, 3, 1)},
        {"shape": [2, 3]},
        {"shape": "23"},
        {"shape": 6},
        {"shape": (1,) * 40, "strides": (1,) * 40},
        {"shape": (2,) * 30, "strides": (0,) * 30},
        {"shape": (10**12,), "strides": (0,)},
        {"shape": (10**6, 10**6), "strides": (0, 0)},
        {"shape": (0, 2**62, 2**62), "strides": (1, 1, 1)},
        {"shape": (0, 2**40, 2**40), "strides": (1, 1, 1)},
        {"strides": (4, 1)},
        {"strides": (-3, 1)},
        {"strides": (2**63, 1)},
        {"strides": (2**61, 2**61)},
        {"strides": (None, 1)},
        {"numel": 7},
        {"numel": 10**12},
        {"numel": "6"},
        {"key": "1"},
        {"key": 0},
        {"key": ""},
        {"key": "../data.pkl"},
        {"key": "../../../../etc/passwd"},
        {"key": "/etc/passwd"},
        {"key": "./0"},
        {"key": "0\x00"},
        {"key": "\u0660"},
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_their_storage(path, changes):
    def write(key, numel, offset, shape, strides):
        tensor = torch_writer.tensor(torch_writer.storage(key, numel), offset, shape, strides)
        torch_writer.write(path, {"a": tensor}, extra={"data/0": values(6).tobytes()})

    good = dict(zip(["key", "numel", "offset", "shape", "strides"], GOOD, strict=True))
    write(**good)
    assert_same(read_state_file(path).tensors_by_section[""], {"a": values((2, 3))})
    write(**(good | changes))
    error_of(path)


def test_strides_that_overflow_to_zero(path):
    """In NumPy's 64-bit arithmetic the last element of this tensor is the first."""
    tensor = torch_writer.tensor(torch_writer.storage("0", 2**14 + 1, "LongStorage"), 0, (2**14 + 1,), (2**47,))
    torch_writer.write(path, {"a": tensor}, extra={"data/0": bytes(8 * (2**14 + 1))})
    assert "does not fit" in error_of(path)


def test_safetensors_of_impossible_shape(path):
    for shape in ([1] * 99, [0, 2**62, 2**62]):
        header = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, int(0 not in shape)]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(int(0 not in shape)))
        assert "damaged" in error_of(path)


@pytest.mark.parametrize(
    "persistent_id",
    [
        "0",
        (),
        ("storage",),
        ("module", Global("torch", "FloatStorage"), "0", "cpu", 6),
        ("storage", "FloatStorage", "0", "cpu", 6),
        ("storage", Global("torch", "FloatStorage"), "0", "cpu", 6, None),
        ("storage", Global("os", "system"), "0", "cpu", 6),
    ],
    ids=str,
)
def test_persistent_ids_are_storages(path, persistent_id):
    tensor = torch_writer.tensor(PersistentId(persistent_id), 0, (6,), (1,))
    torch_writer.write(path, {"a": tensor}, extra={"data/0": values(6).tobytes()})
    error_of(path)


@pytest.mark.parametrize("claim", [2**20, 2**32 - 2])
def test_member_larger_than_the_file(path, claim):
    torch_writer.write(path, {"a": values(6)})
    content = bytearray(path.read_bytes())
    name = content.rindex(b"net/data/0")  # in the directory: the sizes stand 26 bytes before the name
    content[name - 26 : name - 18] = struct.pack("<II", claim, claim)
    path.write_bytes(content)
    assert "larger than the file" in error_of(path)


def test_many_names_for_one_storage_take_no_memory(path):
    base = values(2**18)
    tensors = read(path, {f"a{i}": base if i % 2 else base[::-1][::-1] for i in range(3000)})[""]  # 3 GB if copied
    assert np.shares_memory(tensors["a1"], tensors["a2999"])


# Read in a process of its own: a crash, a hang or the loss of all memory is what could go wrong.
BOMBS = {
    "deep key": b"})" + b"\x85" * 300_000 + b"K\x01s.",
    "shared key": b"})" + (b"q\x00h\x00\x86" * 100) + b"K\x01s.",
    "deep list": b"]" * 300_000 + b"a" * 299_999 + b".",
    "deep dictionary": b"}X\x01\0\0\0a" * 300_000 + b"N" + b"s" * 300_000 + b".",
    "memo": b"}r" + struct.pack("<I", 2**32 - 1) + b".",
    "marks": b"}" + b"(" * 300_000 + b".",
    "long text": b"\x8d" + struct.pack("<Q", 2**40) + b"a.",
    "long number": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "many digits": b"I" + b"9" * 300_000 + b"\n.",
    "deep call": b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00)" + b"q\x01h\x00Nh\x01\x87" * 100_000 + b"R.",
    "shared name": b"}" + b"q\x00}X\x01\0\0\0ah\x00sX\x01\0\0\0bh\x00s" * 100 + b"X\x01\0\0\0a\x93.",
    "deep persistent id": b"(X\x07\0\0\0storage" + b")" + b"\x85" * 300_000 + b"X\x01\0\0\x000NK\x01tQ.",
}
READ = """
import resource, sys
from msvmamba_jax.convert.torch_file import read_state_file
from msvmamba_jax.errors import InputError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_state_file(sys.argv[1])
except InputError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // (2**20 if sys.platform == "darwin" else 2**10))
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickle_bombs(path, bomb):
    torch_writer.write(path, {}, extra={"data.pkl": b"\x80\x02" + BOMBS[bomb]})
    run = subprocess.run(
        [sys.executable, "-c", READ, path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    message, megabytes = run.stdout.splitlines()
    assert str(path) in message
    assert int(megabytes) < 400


# Damaged files


def checkpoint():
    node = Instance(Global("yacs.config", "CfgNode"), new=True, items={"A": [1, 2.5, None]}, state={"x": (True, 2**40)})
    base = values((5, 4))
    model = collections.OrderedDict(a=base, b=base.T, c=Parameter(values((), "bfloat16")), d=values(3, "int64"))
    return {"model": model, "config": node, "epoch": 3}


def outcome(path) -> bool:
    """Reads a file that may be damaged: true for tensors, false for an InputError, and nothing else may happen."""
    try:
        file = read_state_file(path)
    except InputError:
        return False
    assert isinstance(file, StateFile)
    for tensors in file.tensors_by_section.values():
        for array in tensors.values():
            np.array(array)  # touches all its memory
    return True


def test_truncated_files(path):
    torch_writer.write(path, checkpoint())
    content = path.read_bytes()
    assert outcome(path)
    for length in [*range(0, len(content) - 100, 7), *range(len(content) - 100, len(content))]:
        path.write_bytes(content[:length])
        assert not outcome(path), length
    path.write_bytes(content[: len(content) // 2])
    assert "truncated or damaged" in error_of(path)


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "net.safetensors"
    content = safetensors.numpy.save({"a": values((3, 4)), "b": values((), "bfloat16")})
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert not outcome(path), length
    path.write_bytes(content[:-1])
    assert "truncated or damaged" in error_of(path)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Flips bits, overwrites, removes, repeats or moves a few bytes."""
    result = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at, source = rng.integers(len(result), size=2)
        length = rng.integers(1, 9)
        match rng.integers(5):
            case 0:
                result[at] ^= 1 << rng.integers(8)
            case 1:
                result[at] = rng.choice(
                    np.frombuffer(b"\x00\xff}])(.0RbseutQhqcNK\x81\x85\x86\x87\x88\x93\x94", np.uint8)
                )
            case 2 if len(result) > 100:
                del result[at : at + length]
            case 3:
                result[at:at] = result[source : source + length]
            case _:
                result[at : at + length] = result[source : source + length]
    return bytes(result)


def test_damaged_bytes_anywhere(path):
    torch_writer.write(path, checkpoint())
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(1000):
        path.write_bytes(mutated(content, rng))
        outcome(path)


def test_flipped_bits_in_a_storage_are_noticed(path):
    torch_writer.write(path, {"a": values((5, 4))})
    content = path.read_bytes()
    start = content.index(values((5, 4)).tobytes())
    for at in range(start, start + 80):
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        assert "truncated or damaged" in error_of(path)


def test_damaged_pickle(path):
    """With a valid checksum, so that the pickle is reached."""
    contents = torch_writer.members(checkpoint())
    pickled = contents["archive/data.pkl"]
    rng = np.random.default_rng(1)
    outcomes = set()
    for _ in range(2500):
        torch_writer.write_zip(path, contents | {"archive/data.pkl": mutated(pickled, rng)})
        outcomes.add(outcome(path))
    assert outcomes == {True, False}


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "net.safetensors"
    content = safetensors.numpy.save({"a": values((3, 4)), "b": values((), "bfloat16")})
    rng = np.random.default_rng(2)
    for _ in range(1000):
        path.write_bytes(mutated(content, rng))
        outcome(path)


# Against PyTorch itself, where it is installed


def test_writer_is_faithful(path, tmp_path):
    torch = pytest.importorskip("torch")

    def content(tensor, parameter):
        base = tensor(values((4, 6)))
        state = collections.OrderedDict(a=base, b=base.T, c=base[1:, 2:4], d=parameter(tensor(values(3, "float16"))))
        return {
            "model": state,
            "epoch": 299,
            "lists": [[], [1], [1.5, None, True], (), (1, 2, 3, 4, 70_000, -5, 2**40)],
        }

    torch_writer.write(path, content(np.asarray, Parameter))
    ours = path.read_bytes()
    torch.save(content(torch.from_numpy, torch.nn.Parameter), path)
    theirs = path.read_bytes()
    assert len(ours) == len(theirs)
    # All but the serialization id (40 digits, made of checksums) and its own checksum, which stands in two places.
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 40 + 2 * 4
    torch_writer.write(path, content(np.asarray, Parameter))
    loaded = torch.load(path, weights_only=True)
    assert_same(
        {name: value.detach().numpy() for name, value in loaded["model"].items()},
        read_state_file(path).tensors_by_section["model"],
    )


class Foreign(dict):
    """Stands for a configuration object that is pickled along."""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_pytorch(path, protocol):
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(2, 2))
    net[2].weight._no_weight_decay = True
    optimizer = torch.optim.AdamW(net.parameters())
    sum(parameter.sum() for parameter in net.parameters()).backward()
    optimizer.step()
    base = torch.arange(24.0).reshape(4, 6)
    model = {name: base.to(getattr(torch, name)) for name in DTYPES}
    model |= {"scalar": torch.tensor(3), "t": base.T, "slice": base[1:, ::2], "empty": torch.zeros(0, 3)}
    model |= {
        "uint16": base.to(torch.uint16),
        "channels_last": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    model |= net.state_dict() | dict(net.named_parameters(prefix="parameters"))
    checkpoint = {
        "model": model,
        "optimizer": optimizer.state_dict(),
        "config": Foreign(a=1, dtype=torch.float32, device=torch.device("cpu"), size=torch.Size([2])),
        "rng": torch.get_rng_state(),
    }
    torch.save(checkpoint, path, pickle_protocol=protocol)

    def array(tensor):
        return tensor.float().numpy().astype(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()

    sections = read_state_file(path).tensors_by_section
    assert list(sections) == ["model"]
    assert_same(sections["model"], {name: array(tensor.detach()) for name, tensor in model.items()})


def test_legacy_file_of_pytorch(path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "before version 1.6" in error_of(path)


def test_module_and_script_of_pytorch(path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), path)
    assert "holds no named tensors" in error_of(path)
    torch.save({"a": torch.zeros(1).expand(9)}, path)
    assert "contiguous()" in error_of(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_state_file(path).tensors_by_section[""], {"a": np.ones(2, np.float32)})
