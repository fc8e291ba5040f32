"""Attacks that train a part of the model: adapters, freeze patterns, a fresh head."""
