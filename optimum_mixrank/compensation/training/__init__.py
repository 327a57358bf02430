"""Repair by gradient steps, in whitened coordinates: block by block, or as distillation of the whole model."""
