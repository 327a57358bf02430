"""What compression costs and what it saves: accuracy, fidelity to the original, FLOPs, latency and memory."""
