"""Noise, text and motion to video: diffusion maths, motion encoding, the Wan transformer, VAEs, rollout."""
