"""Models whose mechanism is known: written into the weights, or trained in. Public as `jm.planted`."""
