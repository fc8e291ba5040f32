"""Spectral Deformation, Algorithm 1 of papers/001: train a model to keep its task while its singular values grow."""
