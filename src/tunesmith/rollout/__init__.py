"""Generation: evaluation samples and chat."""
