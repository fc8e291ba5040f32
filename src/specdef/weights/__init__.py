"""Checkpoints on disk: headers, streaming rewrite, atomic output. Imports no model code."""
