"""How programs are run: compiled into graphs, and evaluated outside of Pyro on data of any size."""
