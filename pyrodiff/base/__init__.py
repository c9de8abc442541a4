"""What all else rests on: argument checks, float64, random generators, distributed ranks, files, an ODE solver."""
