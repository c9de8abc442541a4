"""What a trained diffusion says of data: bounds, importance weights, the flow's density, and their verification."""
