"""Suites: which models, methods, settings, prompts and seeds a run compares, as data; knows no model and no method."""
