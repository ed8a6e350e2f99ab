"""Attention over a hierarchy of pooled keys: block lists along a curve, means, selection, log-linear attention."""
