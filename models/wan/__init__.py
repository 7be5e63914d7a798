"""The Wan diffusion transformer (teacher, critic and student), its KV caches and checkpoints."""
