"""Attacks on training locks: one attack per file; what is attacked, what counts and what it may cost are kept apart."""
