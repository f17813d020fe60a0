"""How the original's tensors correspond to this package's weights: rules for the backbone and for each task's head."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from msvmamba_jax.convert import mask_rcnn_names, upernet_names
from msvmamba_jax.convert.layouts import DEPTHWISE, LINEAR, PATCHES, POINTWISE, SAME, Layout, Rule, stacked

_STAGE, _BLOCK = r"layers\.(?P<stage>\d+)", r"layers\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)"
_OURS = "backbone.stages.{stage}.blocks.{block}"

# Index 0 of MSVMamba's stacked scan parameters is the half-resolution branch, index 1 the full-resolution one.
_SSMS = {"multi_scale": ("half_ssm", "full_ssm"), "cross_scan": tuple(f"ssms.{route}" for route in range(4))}

_NORM = {"weight": "scale", "bias": "bias"}

_COMMON: list[Rule] = [
    (r"patch_embed\.0\.weight", ("backbone.patch_embedding.projection.kernel",), PATCHES),
    (r"patch_embed\.0\.bias", ("backbone.patch_embedding.projection.bias",), SAME),
    (_BLOCK + r"\.op\.in_proj\.weight", (_OURS + ".mixer.in_projection.kernel",), LINEAR),
    (_BLOCK + r"\.op\.out_proj\.weight", (_OURS + ".mixer.out_projection.kernel",), LINEAR),
    (_STAGE + r"\.downsample\.reduction\.weight", ("backbone.downsamplings.{stage}.reduction.kernel",), LINEAR),
]
for _theirs, _ours in _NORM.items():
    _COMMON += [
        (rf"patch_embed\.2\.{_theirs}", (f"backbone.patch_embedding.norm.{_ours}",), SAME),
        (rf"{_BLOCK}\.norm\.{_theirs}", (f"{_OURS}.norm.{_ours}",), SAME),
        (rf"{_BLOCK}\.op\.out_norm\.{_theirs}", (f"{_OURS}.mixer.out_norm.{_ours}",), SAME),
        (rf"{_STAGE}\.downsample\.norm\.{_theirs}", (f"backbone.downsamplings.{{stage}}.norm.{_ours}",), SAME),
    ]

_MULTI_SCALE: list[Rule] = [
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

_CROSS_SCAN: list[Rule] = [
    (_BLOCK + r"\.op\.conv2d\.weight", (_OURS + ".mixer.conv.kernel",), DEPTHWISE),
    (_BLOCK + r"\.op\.conv2d\.bias", (_OURS + ".mixer.conv.bias",), SAME),
]

_SCAN = {
    "x_proj_weight": ("projection.kernel", stacked("k p d", "k d p")),
    "dt_projs_weight": ("delta_kernel", stacked("k d r", "k r d")),
    "dt_projs_bias": ("delta_bias", stacked("k d", "k d")),
    "A_logs": ("A_log", stacked("(k d) n", "k d n")),
    "Ds": ("D", stacked("(k d)", "k d")),
}

# What each task puts behind the backbone. Rules name whole tensors, with their prefixes, on both sides.
_HEADS: dict[str, list[Rule]] = {
    "classification": [
        (r"classifier\.norm\.weight", ("norm.scale",), SAME),
        (r"classifier\.norm\.bias", ("norm.bias",), SAME),
        (r"classifier\.head\.weight", ("head.kernel",), LINEAR),
        (r"classifier\.head\.bias", ("head.bias",), SAME),
    ],
    "segmentation": upernet_names.RULES,
    "detection": mask_rcnn_names.RULES,
}

# In the models of dense tasks the backbone is a part, and has a norm behind each stage.
_OUT_NORMS: list[Rule] = [
    (rf"backbone\.outnorm(?P<stage>\d+)\.{theirs}", (f"out_norms.{{stage}}.{ours}",), SAME)
    for theirs, ours in _NORM.items()
]

# Names of earlier releases that the original's loader still accepts.
_OLD_NAMES = [
    (re.compile(r"(backbone\.)?patch_embed\.proj\.(.*)"), r"\1patch_embed.0.\2"),
    (re.compile(r"(backbone\.)?patch_embed\.norm\.(.*)"), r"\1patch_embed.2.\2"),
    (re.compile(r"((backbone\.)?layers\.\d+\.blocks\.\d+)\.ln_1\.(.*)"), r"\1.norm.\3"),
    (re.compile(r"((backbone\.)?layers\.\d+\.blocks\.\d+)\.self_attention\.(.*)"), r"\1.op.\3"),
    (re.compile(r"(norm|head)\.(.*)"), r"classifier.\1.\2"),
]

# Steps that a batch normalisation has seen, which PyTorch needs for a running average without momentum only.
_WITHOUT_COUNTERPART = {"segmentation": re.compile(r"(decode|auxiliary)_head\..*\.bn\.num_batches_tracked")}


def rules(mixer: str, task: str = "classification") -> list[tuple[re.Pattern[str], tuple[str, ...], Layout]]:
    """All rules for a task's models with the given mixer: pattern of the original name, templates of ours, layout."""
    table = _COMMON + (_MULTI_SCALE if mixer == "multi_scale" else _CROSS_SCAN)
    for theirs, (ours, layout) in _SCAN.items():
        names = tuple(f"{_OURS}.mixer.{ssm}.{ours}" for ssm in _SSMS[mixer])
        table = [*table, (rf"{_BLOCK}\.op\.{theirs}", names, layout)]
    if task != "classification":
        table = [(rf"backbone\.{theirs}", ours, layout) for theirs, ours, layout in table] + _OUT_NORMS
    return [(re.compile(pattern), ours, layout) for pattern, ours, layout in table + _HEADS[task]]


def current_name(name: str) -> str:
    """`name` of a tensor in any release as the current release calls it."""
    for pattern, replacement in _OLD_NAMES:
        if pattern.fullmatch(name):
            name = pattern.sub(replacement, name)
    return name


def has_counterpart(name: str, task: str) -> bool:
    """False for a tensor that means nothing here: `to_ours` drops it, `to_original` does not make it."""
    return task not in _WITHOUT_COUNTERPART or not _WITHOUT_COUNTERPART[task].fullmatch(name)


def to_ours(state: Mapping[str, np.ndarray], mixer: str, task: str = "classification") -> dict[str, np.ndarray]:
    """The original's state dict (current names) as ours, parameters and statistics by dotted name.

    Tensors without a counterpart are dropped.

    Raises:
        KeyError: a tensor that fits no rule.
        einops.EinopsError: a tensor of another rank.
    """
    table = rules(mixer, task)
    converted: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        if not has_counterpart(name, task):
            continue
        matches = [(match, ours, layout) for pattern, ours, layout in table if (match := pattern.fullmatch(name))]
        if len(matches) != 1:
            raise KeyError(f"{len(matches)} rules fit the tensor {name}")
        [(match, ours, layout)] = matches
        for template, part in zip(ours, layout.split(tensor, len(ours)), strict=True):
            converted[template.format(**match.groupdict())] = part
    return converted


def to_original(weights: Mapping[str, np.ndarray], mixer: str, task: str = "classification") -> dict[str, np.ndarray]:
    """The inverse of `to_ours`: bit for bit the tensors that `weights` (by dotted name) came from.

    Raises:
        KeyError: an array that no rule makes.
    """
    state: dict[str, np.ndarray] = {}
    left = dict(weights)
    for pattern, templates, layout in rules(mixer, task):
        first = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(templates[0])))
        for match in [m for name in weights if (m := first.fullmatch(name))]:
            places = match.groupdict()
            parts = [left.pop(template.format(**places)) for template in templates]
            name = pattern.pattern
            for key, value in places.items():
                name = name.replace(rf"(?P<{key}>\d+)", value)
            state[name.replace("\\", "")] = layout.join([np.asarray(part) for part in parts])
    if left:
        raise KeyError(f"no rule makes {', '.join(left)}")
    return state
