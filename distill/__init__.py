"""From the teacher to the streaming student: ODE pairs, causal initialisation, Self-Forcing DMD."""
