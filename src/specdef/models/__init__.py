"""Tiny seeded nets, and loaders of real models from packages."""
