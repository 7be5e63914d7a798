"""Flow matching: the time grid, conversions between predictions, guidance, keyed noise and the sampler."""
