"""Experiments: short scripts over the public API."""
