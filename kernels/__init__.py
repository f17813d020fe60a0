"""Kernels of state-space models; they know nothing of the models that use them."""
