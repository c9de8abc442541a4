"""Stochastic variational inference over one torch optimizer, compiled and over several processes."""
