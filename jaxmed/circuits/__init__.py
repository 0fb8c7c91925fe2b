"""Circuits: scores of the edges between heads and MLPs, and how far the best of them alone carry a behaviour.

Public as `jm.circuits`; `jm.circuit` does all of it in one call.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names and types: __init__.pyi; imported when first used
