"""Causal effects: outcomes, units, the exact engine, and the sweep that runs it over pairs."""
