"""The published analyses, end to end, each from one config."""
