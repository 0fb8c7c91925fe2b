"""Figures and one HTML page, from saved results only: no JAX, no model, no weights."""
