"""Activations of many prompts as one labelled table, in memory or in a folder, and the direction between two sets of prompts."""
