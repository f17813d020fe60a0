"""Experiments: one file with `get_config()` each; its docstring states command, cost and expected score."""
