"""Object detection: the operators of Mask R-CNN as pure functions, and the parts of the network.

Operators, each a file that depends on the ones before it at most: `boxes` (overlap and coding), `anchors`,
`assignment`, `sampling`, `nms`, `roi_align`, `masks`. They take single images or whole batches as their docstrings say,
have static shapes, mark padding with boolean masks, and work under `jax.jit`, `jax.vmap` and `jax.shard_map`.

A box is (x1, y1, x2, y2) in pixels, float32; its width is x2 - x1. The centre of the top left pixel is at (0.5, 0.5).
"""
