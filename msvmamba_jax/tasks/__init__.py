"""What a training run is about: loss, predictions and metrics, behind one small protocol."""
