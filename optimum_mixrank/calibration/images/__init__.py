"""From whatever a user holds to batches of images that a model takes."""
