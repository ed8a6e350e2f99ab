"""Diffusion in pixel space, one token a pixel: the setting in which long sequences are trained from nothing."""
