"""Samplers: draws from a trained diffusion."""
