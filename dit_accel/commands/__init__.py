"""Subcommands of `dit-accel`, one module each."""
