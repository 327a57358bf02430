"""What a compression costs and what it saves: accuracy, fidelity to the original, size on disk, FLOPs."""
