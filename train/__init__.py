"""Training stages and the one loop that runs them all."""
