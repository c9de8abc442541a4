"""The forward process q: noise schedules, the levels of quantised data, and the kernels of the chain."""
