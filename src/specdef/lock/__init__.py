"""Locks: methods, key, certificate, unlock, verify, authorised training."""
