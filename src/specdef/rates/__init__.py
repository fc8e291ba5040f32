"""Convergence predicted from curvature: stable learning rates and steps to a target, without training."""
