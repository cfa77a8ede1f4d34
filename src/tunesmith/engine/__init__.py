"""The training loop. Knows no method and no objective by name."""
