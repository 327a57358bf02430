"""Repair layer by layer, from moments: the sequential closed form, and LWEC of arXiv 2402.06004."""
