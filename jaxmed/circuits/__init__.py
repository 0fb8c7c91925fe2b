"""Circuits: scores of the edges between heads and MLPs, and how far the best of them alone carry a behaviour. Public as `jm.circuit`."""
