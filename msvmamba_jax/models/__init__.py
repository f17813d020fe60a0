"""Flax NNX modules: scan mixers, blocks, the backbone, the classifier and the table of variants.

Shapes in this package: b images, h rows, w columns, c channels of the residual stream, d = 2 c channels inside a mixer,
n states per channel, r the rank of the step-size projection. All maps are channels last.
"""
