"""From released PyTorch checkpoints to this package's own: reading, renaming and checking for completeness."""
