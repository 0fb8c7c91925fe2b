"""Experiments on edited models: curves, transfer, compression, dissociation, attacks."""
