"""Numerics with no model in them."""
