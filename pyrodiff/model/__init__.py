"""The reverse process p_θ: denoisers read a network as the data, reverse processes make kernels, decoders end it."""
