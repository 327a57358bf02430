"""From whatever holds images to batches that a model takes."""
