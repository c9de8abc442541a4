"""A diffusion inside a larger program: as the distribution of a site, and given an observation."""
