"""One run over blocks, and its calls: the full forward, the restarted run, and the continuation of a cached prompt."""

from jaxmed.runner.blocks import Ran, Recording, are_few, run
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
    "extend",
    "forward",
    "logits_of",
    "propagate",
    "run",
    "run_tokens",
]
