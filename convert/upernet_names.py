"""The names of mmsegmentation's UperNet head and its auxiliary FCN head."""

from __future__ import annotations

from msvmamba_jax.convert.layouts import CONVOLUTION, POINTWISE, SAME, Layout, Rule


def _conv_unit(theirs: str, ours: str, layout: Layout) -> list[Rule]:
    """A convolution without bias and its batch normalisation."""
    return [
        (rf"{theirs}\.conv\.weight", (f"{ours}.kernel",), layout),
        (rf"{theirs}\.bn\.weight", (f"{ours}.bn.scale",), SAME),
        (rf"{theirs}\.bn\.bias", (f"{ours}.bn.bias",), SAME),
        (rf"{theirs}\.bn\.running_mean", (f"{ours}.bn.mean",), SAME),
        (rf"{theirs}\.bn\.running_var", (f"{ours}.bn.var",), SAME),
    ]


def _classifier(head: str) -> list[Rule]:
    return [
        (rf"{head}\.conv_seg\.weight", (f"{head}.classifier.kernel",), POINTWISE),
        (rf"{head}\.conv_seg\.bias", (f"{head}.classifier.bias",), SAME),
    ]


RULES: list[Rule] = [
    *_conv_unit(r"decode_head\.psp_modules\.(?P<bin>\d+)\.1", "decode_head.pyramid.{bin}", POINTWISE),
    *_conv_unit(r"decode_head\.bottleneck", "decode_head.bottleneck", CONVOLUTION),
    *_conv_unit(r"decode_head\.lateral_convs\.(?P<level>\d+)", "decode_head.laterals.{level}", POINTWISE),
    *_conv_unit(r"decode_head\.fpn_convs\.(?P<level>\d+)", "decode_head.outputs.{level}", CONVOLUTION),
    *_conv_unit(r"decode_head\.fpn_bottleneck", "decode_head.fusion", CONVOLUTION),
    *_classifier("decode_head"),
    *_conv_unit(r"auxiliary_head\.convs\.0", "auxiliary_head.conv", CONVOLUTION),
    *_classifier("auxiliary_head"),
]
