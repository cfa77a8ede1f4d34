"""Whole jobs made of the rooms: train, evaluate, merge, preview, doctor, demo."""
