"""Compressed checkpoints: all that loading them needs, and how they are saved."""
