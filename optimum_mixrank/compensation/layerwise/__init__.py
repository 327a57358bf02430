"""Repair layer by layer, from moments: the sequential closed form, and the paper's LWEC."""
