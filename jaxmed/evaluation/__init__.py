"""Judges of text, and what a model does with harmful and ordinary requests."""
