"""One training loop for every task: state, step, devices, checkpoints and what a run writes."""
