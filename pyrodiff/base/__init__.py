"""The ground: what arguments may be, float64 where it matters, random sources, ranks of several processes, files."""
