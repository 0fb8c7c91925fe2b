"""Between mediation and pruning: whether the weights that a mask removes sit at the units that mediate, and what is left without them."""
