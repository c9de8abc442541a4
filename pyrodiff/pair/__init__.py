"""The pair: the two programs of a diffusion, how t is drawn, and the bound of any two programs, site by site."""
