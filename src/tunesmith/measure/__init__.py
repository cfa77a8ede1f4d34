"""Metrics, intervals, memory, parity checks."""
