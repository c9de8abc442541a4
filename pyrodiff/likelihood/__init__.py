"""The likelihood of data under a diffusion: bounds, importance weights, the flow's density, and their verification."""
