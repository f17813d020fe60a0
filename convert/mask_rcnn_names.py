"""The names of mmdetection's Mask R-CNN: FPN, region proposal network, box head and mask head."""

from __future__ import annotations

from msvmamba_jax.convert.layouts import CONVOLUTION, DECONVOLUTION, LINEAR, POINTWISE, REGIONS, SAME, Layout, Rule


def _layer(theirs: str, ours: str, layout: Layout) -> list[Rule]:
    return [
        (rf"{theirs}\.weight", (f"{ours}.kernel",), layout),
        (rf"{theirs}\.bias", (f"{ours}.bias",), SAME),
    ]


RULES: list[Rule] = [
    *_layer(r"neck\.lateral_convs\.(?P<level>\d+)\.conv", "fpn.laterals.{level}", POINTWISE),
    *_layer(r"neck\.fpn_convs\.(?P<level>\d+)\.conv", "fpn.outputs.{level}", CONVOLUTION),
    *_layer(r"rpn_head\.rpn_conv", "rpn_head.conv", CONVOLUTION),
    *_layer(r"rpn_head\.rpn_cls", "rpn_head.score", POINTWISE),
    *_layer(r"rpn_head\.rpn_reg", "rpn_head.delta", POINTWISE),
    *_layer(r"roi_head\.bbox_head\.shared_fcs\.0", "box_head.first", REGIONS),
    *_layer(r"roi_head\.bbox_head\.shared_fcs\.1", "box_head.second", LINEAR),
    *_layer(r"roi_head\.bbox_head\.fc_cls", "box_head.score", LINEAR),
    *_layer(r"roi_head\.bbox_head\.fc_reg", "box_head.delta", LINEAR),
    *_layer(r"roi_head\.mask_head\.convs\.(?P<layer>\d+)\.conv", "mask_head.convs.{layer}", CONVOLUTION),
    *_layer(r"roi_head\.mask_head\.upsample", "mask_head.upsample", DECONVOLUTION),
    *_layer(r"roi_head\.mask_head\.conv_logits", "mask_head.score", POINTWISE),
]
