"""From images to statistics: the layers to compress, batches of images, and the moments of the layers' activations."""
