"""Experiments: one file with `get_config()` each; its docstring states command, cost and expected score.

`imagenet`, `ade20k` and `coco` are the recipes that the files named after models share.
"""
