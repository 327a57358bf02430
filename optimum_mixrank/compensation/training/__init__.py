"""Repair by gradient descent in whitened coordinates: block by block, or by distillation of the whole model."""
