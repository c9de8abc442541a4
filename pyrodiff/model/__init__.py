"""The reverse process p_θ: denoisers (networks as estimates of x_0), reverse kernels, decoders (the last step)."""
