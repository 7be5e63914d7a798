"""Video autoencoders: pixels [B, 3, T, H, W] in [-1, 1] <-> normalised latents [B, C, F, h, w]."""
