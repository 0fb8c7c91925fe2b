"""One run over blocks, and its calls: the full forward, the restarted run, and the continuation of a cached prompt."""

from jaxmed.runner.blocks import Ran, Recording, are_few, run
from jaxmed.runner.by_layer import each_layer, lies_by_layer, propagate_by_layer
from jaxmed.runner.calls import Readout, extend, forward, logits_of, propagate, run_tokens
from jaxmed.runner.layout import Entry, Layout, Prefix, Restart, causal_layout

__all__ = [
    "Entry",
    "Layout",
    "Prefix",
    "Ran",
    "Readout",
    "Recording",
    "Restart",
    "are_few",
    "causal_layout",
    "each_layer",
    "extend",
    "forward",
    "lies_by_layer",
    "logits_of",
    "propagate",
    "propagate_by_layer",
    "run",
    "run_tokens",
]
