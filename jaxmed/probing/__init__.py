"""Prefix probing (Yang et al. 2025, arXiv 2512.16650): how likely openings of refusal and agreement are, a cheap read-out.

Public as `jm.probing`; `jm.probe` does search and fit in one call.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names and types: __init__.pyi; imported when first used
