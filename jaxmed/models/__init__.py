"""Decoders in Flax, their families, and the checkpoints they are loaded from."""
