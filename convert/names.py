"""How the original's tensors correspond to this package's parameters.

Each rule names an original tensor (a regular expression for the whole name), the parameters made of it, and a pair of
functions that are exact inverses. Layouts: PyTorch's linear kernels are (out, in), ours (in, out); its convolutions are
(out, in, rows, columns), ours channels last.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Layout:
    """One original array as one or more of ours.

    Attributes:
        split: the original array to ours, given their number.
        join: ours to the original array.
    """

    split: Callable[[np.ndarray, int], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]


def _einops(original: str, ours: str, **sizes: int) -> Layout:
    """A permutation of one array's elements."""
    return Layout(
        split=lambda x, _: [rearrange(x, f"{original} -> {ours}", **sizes)],
        join=lambda parts: rearrange(parts[0], f"{ours} -> {original}", **sizes),
    )


def _stacked(original: str, ours: str) -> Layout:
    """An array whose leading axis enumerates routes; each route is a parameter of its own."""
    return Layout(
        split=lambda x, count: list(rearrange(x, f"{original} -> {ours}", k=count)),
        join=lambda parts: rearrange(np.stack(list(parts)), f"{ours} -> {original}"),
    )


SAME = _einops("...", "...")
LINEAR = _einops("o i", "i o")
POINTWISE = _einops("o i 1 1", "i o")
DEPTHWISE = _einops("d 1 i j", "i j d")
PATCHES = _einops("o c p q", "(p q c) o", p=4, q=4, c=3)

_STAGE, _BLOCK = r"layers\.(?P<stage>\d+)", r"layers\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)"
_OURS = "backbone.stages.{stage}.blocks.{block}"

# Index 0 of MSVMamba's stacked scan parameters is the half-resolution branch, index 1 the full-resolution one.
_SSMS = {"multi_scale": ("half_ssm", "full_ssm"), "cross_scan": tuple(f"ssms.{route}" for route in range(4))}

_NORM = {"weight": "scale", "bias": "bias"}

_COMMON: list[tuple[str, tuple[str, ...], Layout]] = [
    (r"patch_embed\.0\.weight", ("backbone.patch_embedding.projection.kernel",), PATCHES),
    (r"patch_embed\.0\.bias", ("backbone.patch_embedding.projection.bias",), SAME),
    (_BLOCK + r"\.op\.in_proj\.weight", (_OURS + ".mixer.in_projection.kernel",), LINEAR),
    (_BLOCK + r"\.op\.out_proj\.weight", (_OURS + ".mixer.out_projection.kernel",), LINEAR),
    (_STAGE + r"\.downsample\.reduction\.weight", ("backbone.downsamplings.{stage}.reduction.kernel",), LINEAR),
    (r"classifier\.head\.weight", ("head.kernel",), LINEAR),
    (r"classifier\.head\.bias", ("head.bias",), SAME),
]
for _theirs, _ours in _NORM.items():
    _COMMON += [
        (rf"patch_embed\.2\.{_theirs}", (f"backbone.patch_embedding.norm.{_ours}",), SAME),
        (rf"{_BLOCK}\.norm\.{_theirs}", (f"{_OURS}.norm.{_ours}",), SAME),
        (rf"{_BLOCK}\.op\.out_norm\.{_theirs}", (f"{_OURS}.mixer.out_norm.{_ours}",), SAME),
        (rf"{_STAGE}\.downsample\.norm\.{_theirs}", (f"backbone.downsamplings.{{stage}}.norm.{_ours}",), SAME),
        (rf"classifier\.norm\.{_theirs}", (f"norm.{_ours}",), SAME),
    ]

_MULTI_SCALE: list[tuple[str, tuple[str, ...], Layout]] = [
    (_BLOCK + r"\.op\.conv2d\.weight", (_OURS + ".mixer.full_conv.kernel",), DEPTHWISE),
    (_BLOCK + r"\.op\.conv2d\.bias", (_OURS + ".mixer.full_conv.bias",), SAME),
    (_BLOCK + r"\.op\.conv2d_b1\.weight", (_OURS + ".mixer.half_conv.kernel",), DEPTHWISE),
    (_BLOCK + r"\.op\.conv2d_b1\.bias", (_OURS + ".mixer.half_conv.bias",), SAME),
    (_BLOCK + r"\.op\.se\.fc\.0\.weight", (_OURS + ".mixer.squeeze_excitation.reduce.kernel",), LINEAR),
    (_BLOCK + r"\.op\.se\.fc\.2\.weight", (_OURS + ".mixer.squeeze_excitation.expand.kernel",), LINEAR),
    (_BLOCK + r"\.convFFN\.linear1\.weight", (_OURS + ".ffn.expand.kernel",), POINTWISE),
    (_BLOCK + r"\.convFFN\.linear1\.bias", (_OURS + ".ffn.expand.bias",), SAME),
    (_BLOCK + r"\.convFFN\.dwc\.weight", (_OURS + ".ffn.conv.kernel",), DEPTHWISE),
    (_BLOCK + r"\.convFFN\.dwc\.bias", (_OURS + ".ffn.conv.bias",), SAME),
    (_BLOCK + r"\.convFFN\.linear2\.weight", (_OURS + ".ffn.reduce.kernel",), POINTWISE),
    (_BLOCK + r"\.convFFN\.linear2\.bias", (_OURS + ".ffn.reduce.bias",), SAME),
    (_BLOCK + r"\.norm2\.weight", (_OURS + ".ffn_norm.scale",), SAME),
    (_BLOCK + r"\.norm2\.bias", (_OURS + ".ffn_norm.bias",), SAME),
]

_CROSS_SCAN: list[tuple[str, tuple[str, ...], Layout]] = [
    (_BLOCK + r"\.op\.conv2d\.weight", (_OURS + ".mixer.conv.kernel",), DEPTHWISE),
    (_BLOCK + r"\.op\.conv2d\.bias", (_OURS + ".mixer.conv.bias",), SAME),
]

_SCAN = {
    "x_proj_weight": ("projection.kernel", _stacked("k p d", "k d p")),
    "dt_projs_weight": ("delta_kernel", _stacked("k d r", "k r d")),
    "dt_projs_bias": ("delta_bias", _stacked("k d", "k d")),
    "A_logs": ("A_log", _stacked("(k d) n", "k d n")),
    "Ds": ("D", _stacked("(k d)", "k d")),
}

# Names of earlier releases that the original's loader still accepts.
_OLD_NAMES = [
    (re.compile(r"patch_embed\.proj\.(.*)"), r"patch_embed.0.\1"),
    (re.compile(r"patch_embed\.norm\.(.*)"), r"patch_embed.2.\1"),
    (re.compile(rf"({_STAGE}\.blocks\.\d+)\.ln_1\.(.*)"), r"\1.norm.\3"),
    (re.compile(rf"({_STAGE}\.blocks\.\d+)\.self_attention\.(.*)"), r"\1.op.\3"),
    (re.compile(r"(norm|head)\.(.*)"), r"classifier.\1.\2"),
]


def rules(mixer: str) -> list[tuple[re.Pattern[str], tuple[str, ...], Layout]]:
    """All rules for models with the given mixer: pattern of the original name, templates of ours, layout."""
    table = _COMMON + (_MULTI_SCALE if mixer == "multi_scale" else _CROSS_SCAN)
    for theirs, (ours, layout) in _SCAN.items():
        names = tuple(f"{_OURS}.mixer.{ssm}.{ours}" for ssm in _SSMS[mixer])
        table = [*table, (rf"{_BLOCK}\.op\.{theirs}", names, layout)]
    return [(re.compile(pattern), ours, layout) for pattern, ours, layout in table]


def current_name(name: str) -> str:
    """`name` of a tensor in any release as the current release calls it."""
    for pattern, replacement in _OLD_NAMES:
        if pattern.fullmatch(name):
            name = pattern.sub(replacement, name)
    return name


def to_ours(state: Mapping[str, np.ndarray], mixer: str) -> dict[str, np.ndarray]:
    """The original's state dict (current names) as ours, by dotted name.

    Raises:
        KeyError: a tensor that is in no rule.
        einops.EinopsError: a tensor of another rank.
    """
    table = rules(mixer)
    converted: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        matches = [(match, ours, layout) for pattern, ours, layout in table if (match := pattern.fullmatch(name))]
        if len(matches) != 1:
            raise KeyError(f"{len(matches)} rules fit the tensor {name}")
        [(match, ours, layout)] = matches
        for template, part in zip(ours, layout.split(tensor, len(ours)), strict=True):
            converted[template.format(**match.groupdict())] = part
    return converted


def to_original(parameters: Mapping[str, np.ndarray], mixer: str) -> dict[str, np.ndarray]:
    """The inverse of `to_ours`: bit for bit the tensors that `parameters` (by dotted name) came from.

    Raises:
        KeyError: a parameter that no rule makes.
    """
    state: dict[str, np.ndarray] = {}
    left = dict(parameters)
    for pattern, templates, layout in rules(mixer):
        first = re.compile(
            re.escape(templates[0]).replace(r"\{stage\}", r"(?P<stage>\d+)").replace(r"\{block\}", r"(?P<block>\d+)")
        )
        for match in [m for name in parameters if (m := first.fullmatch(name))]:
            places = match.groupdict()
            parts = [left.pop(template.format(**places)) for template in templates]
            name = pattern.pattern
            for key, value in places.items():
                name = name.replace(rf"(?P<{key}>\d+)", value)
            state[name.replace("\\", "")] = layout.join([np.asarray(part) for part in parts])
    if left:
        raise KeyError(f"no rule makes {', '.join(left)}")
    return state
