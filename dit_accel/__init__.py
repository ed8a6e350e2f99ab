"""Sparse attention for diffusers' image and video transformers."""

__version__ = "0.1.0"
