"""Measurements: the engine against the bare matmuls of its shapes, and against other ways to do the same sweep."""
