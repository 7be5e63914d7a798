"""Point tracks and the ways a model reads them: identity maps on the latent grid, or drawn pixels."""
