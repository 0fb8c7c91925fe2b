"""jaxmed: causal mediation analysis of language models in JAX.

import jaxmed as jm

model = jm.load("smollm2-135m-instruct")
table = jm.sweep(model, jm.read_pairs("harm")[:1])
print(table.neuron)
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names and types: __init__.pyi; imported when first used
