"""The two languages of tilert: the op graph and the tile program, and the machines they are made for."""
