"""What XLA puts beside the scan in a compiled block: no copy, transpose, reversal or concatenation of a map."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from msvmamba_jax.models.backbone import BackboneConfig, Block
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, bind, get_parameters

_RENAMES = {"bitcast", "get-tuple-element"}  # of the same bytes
_REORDERS = {"concatenate", "gather", "reverse", "transpose"}
_MOVES = _REORDERS | {"convert", "copy", "dynamic-slice", "dynamic-update-slice", "reshape", "slice"}
# A pad is no fault: XLA fills up the rows of a matrix product that it splits, in the gradient of delta's weights.
_SOURCES = {"broadcast", "constant", "iota", "parameter", "tuple"}


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    line: str

    @property
    def elements(self) -> int:
        """Of the largest array of the result."""
        dimensions = re.findall(r"[a-z]\w*\[([\d,]*)\]", self.shape)
        return max(math.prod(map(int, filter(None, sizes.split(",")))) for sizes in dimensions)


def computations(hlo: str) -> dict[str, dict[str, Instruction]]:
    """The instructions of each computation, by name."""
    found: dict[str, dict[str, Instruction]] = {}
    instructions: dict[str, Instruction] = {}
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            instructions = found.setdefault(header[1], {})
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line):
            name, shape, opcode, rest = match.groups()
            operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            instructions[name] = Instruction(name, shape, opcode, operands, line)
    return found


def moved_maps(hlo: str) -> Iterator[str]:
    """Instructions next to a Mosaic GPU kernel that only move, or reorder, an array as large as the kernel's map."""
    all_computations = computations(hlo)
    for instructions in all_computations.values():
        for kernel in instructions.values():
            if kernel.opcode == "custom-call" and 'custom_call_target="mosaic_gpu' in kernel.line:
                size = instructions[kernel.operands[0]].elements
                for neighbour in neighbours(kernel, instructions):
                    if neighbour.elements >= size and (fault := fault_of(neighbour, size, all_computations)):
                        yield f"{fault}: {neighbour.line.strip()[:200]}"


def neighbours(kernel: Instruction, instructions: dict[str, Instruction]) -> Iterator[Instruction]:
    """What computes the operands of a kernel, and what takes its results."""
    for name in kernel.operands:
        while instructions[name].opcode in _RENAMES:
            name = instructions[name].operands[0]
        yield instructions[name]
    results = [kernel.name]
    for result in results:
        for user in instructions.values():
            if result in user.operands:
                if user.opcode in _RENAMES:
                    results.append(user.name)
                else:
                    yield user


def fault_of(instruction: Instruction, size: int, all_computations: dict[str, dict[str, Instruction]]) -> str | None:
    """Why an instruction should not be there."""
    if instruction.opcode in _MOVES:
        return instruction.opcode
    if instruction.opcode != "fusion":
        return None
    called = re.search(r"calls=%?([\w.-]+)", instruction.line)
    assert called is not None
    fused = all_computations[called[1]].values()
    reordered = [x.opcode for x in fused if x.opcode in _REORDERS and x.elements >= size]
    if reordered:
        return f"fusion with {reordered[0]}"
    computes = any(x.opcode not in _MOVES | _RENAMES | _SOURCES for x in fused)
    return None if computes else "fusion that computes nothing"


HLO = """
%fused_multiply (p: bf16[2,4,4,8]) -> bf16[2,4,4,8] {
  %p = bf16[2,4,4,8]{3,2,1,0} parameter(0)
  ROOT %m = bf16[2,4,4,8]{3,2,1,0} multiply(%p, %p)
}

%fused_moves (p.1: bf16[2,4,4,8]) -> bf16[2,4,4,8] {
  %p.1 = bf16[2,4,4,8]{3,2,1,0} parameter(0)
  ROOT %c.1 = bf16[2,4,4,8]{3,2,1,0} copy(%p.1)
}

%fused_reverse (p.2: bf16[2,4,4,8]) -> bf16[2,4,4,8] {
  %p.2 = bf16[2,4,4,8]{3,2,1,0} parameter(0)
  %r.2 = bf16[2,4,4,8]{3,2,1,0} reverse(%p.2), dimensions={1}
  ROOT %m.2 = bf16[2,4,4,8]{3,2,1,0} add(%r.2, %r.2)
}

ENTRY %main (x: bf16[2,4,4,8]) -> bf16[2,4,4,8] {
  %x = bf16[2,4,4,8]{3,2,1,0} parameter(0)
  %small = f32[2,8,4]{2,1,0} parameter(1)
  %u = bf16[2,4,4,8]{3,2,1,0} PRODUCER
  %same = bf16[2,4,4,8]{3,2,1,0} bitcast(%u)
  %bc = f32[2,4,8]{2,1,0} transpose(%small), dimensions={0,2,1}
  %scan = (bf16[2,1,4,4,8]{4,3,2,1,0}, f32[2,8]{1,0}) custom-call(%same, %x, %bc), custom_call_target="mosaic_gpu_v2"
  %y = bf16[2,1,4,4,8]{4,3,2,1,0} get-tuple-element(%scan), index=0
  %flat = bf16[2,4,4,8]{3,2,1,0} bitcast(%y)
  ROOT %z = bf16[2,4,4,8]{3,2,1,0} CONSUMER
}
"""
COMPUTES = "fusion({}), kind=kLoop, calls=%fused_multiply"


@pytest.mark.parametrize(
    ("producer", "consumer", "expected"),
    [
        (COMPUTES, COMPUTES, []),
        ("copy({})", COMPUTES, ["copy"]),
        (COMPUTES, "transpose({}), dimensions={{0,2,1,3}}", ["transpose"]),
        ("fusion({}), kind=kLoop, calls=%fused_moves", COMPUTES, ["fusion that computes nothing"]),
        (COMPUTES, "fusion({}), kind=kLoop, calls=%fused_reverse", ["fusion with reverse"]),
    ],
)
def test_what_is_found(producer, consumer, expected):
    hlo = HLO.replace("PRODUCER", producer.format("%x")).replace("CONSUMER", consumer.format("%flat"))
    assert [fault.split(":")[0] for fault in moved_maps(hlo)] == expected


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="compiles for the GPU that is there")
@pytest.mark.parametrize(("width", "stage"), [(48, 0), (96, 2)], ids=["nano-0", "tiny-2"])
def test_no_map_is_moved(width, stage):
    """A block and its gradient, 128 images of 224 x 224 pixels in bfloat16."""
    features, side = width * 2**stage, 56 >> stage
    config = BackboneConfig(width=width, depths=(1, 1, 1, 1))
    options = {"index": 0, "dtype": "bfloat16", "scan_implementation": "mosaic", "rngs": SHAPE_KEYS}
    model = abstract_model(lambda: Block(features, config, **options))
    x = jax.ShapeDtypeStruct((128, side, side, features), jnp.bfloat16)

    def forward(parameters, x):
        return bind(model, parameters)(x)

    def gradient(parameters, x, dy):
        y, pull_back = jax.vjp(forward, parameters, x)
        return y, pull_back(dy)

    parameters = get_parameters(model)
    for compiled, kernels in (
        (jax.jit(forward).lower(parameters, x).compile(), 2),
        (jax.jit(gradient).lower(parameters, x, x).compile(), 4),
    ):
        hlo = compiled.as_text()
        assert hlo.count('custom_call_target="mosaic_gpu') >= kernels
        assert list(moved_maps(hlo)) == []
