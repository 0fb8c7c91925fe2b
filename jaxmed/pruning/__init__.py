"""Weights that carry a behaviour: scores from one pass over examples, masks by rule, edited models. `jm.pruning` in Python."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names and types: __init__.pyi; imported when first used
