"""From files to batches on the host: images, preprocessing, data sets and the pipeline. Knows no model and no JAX."""
