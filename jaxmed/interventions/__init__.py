"""Interventions as arguments: sites, edits, and how they act inside a run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["edits"])
