"""A diffusion inside a larger program: as the law of a site, and given an observation."""
