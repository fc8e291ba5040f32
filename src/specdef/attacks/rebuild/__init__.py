"""Attacks that take a model's outputs only, and the from-scratch reference beside them."""
