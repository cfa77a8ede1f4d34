"""Metrics, intervals, parity checks."""
