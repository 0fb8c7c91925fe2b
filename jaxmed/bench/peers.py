"""The PyTorch contestants, driven in a process of their own so that the two frameworks never share a thread pool."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxmed.bench.contestants import engine
from jaxmed.bench.shapes import Subject
from jaxmed.models.catalog import locate

SLOW = {"hooks-one": 16, "hooks-batch": 64, "hooks-batch-keep": 64}
"""Neurons per round of the contestants that run full forwards."""
LABELS = {
    "hooks-one": "torch, forward hooks, one at a time",
    "hooks-batch": "torch, forward hooks, batches of 32",
    "hooks-batch-keep": "torch, forward hooks, batches of 32, logits_to_keep=1",
    "suffix-eager": "torch, same algorithm, eager",
    "suffix-compile": "torch, same algorithm, torch.compile",
}


def installed() -> bool:
    """Whether PyTorch is there to be measured."""
    return importlib.util.find_spec("torch") is not None


class Peers:
    """The PyTorch process; without PyTorch there are no contestants in it."""

    def __init__(self, subject: Subject, shape: str):
        self.process: subprocess.Popen[str] | None = None
        self.neurons = subject.model.config.neurons
        if not installed():
            return
        command = [sys.executable, "-m", "jaxmed.bench.torch_peers"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        config, answers = subject.model.config, subject.answers
        signed = {
            side: [i[0] for i, w in zip(answers.ids, answers.weights[0], strict=True) if w * sign > 0]
            for side, sign in (("target", 1), ("foil", -1))
        }
        random = {
            key: getattr(config, key) for key in ("layers", "width", "heads", "kv_heads", "head_width", "neurons", "vocabulary", "tied")
        }
        self.ask(
            op="setup",
            model=None if shape else str(locate(subject.model.name)),
            base=subject.base.tolist(),
            source=subject.source.tolist(),
            **signed,
            dtype=config.dtype,
            threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            device="cuda" if jax.default_backend() == "gpu" else "cpu",
            random={**random, "rope_base": config.rope.base} if shape and config.rope else None,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise RuntimeError(f"PyTorch contestant: {answer['error']}")
        return answer

    def contestants(self, layers: list[int], middle: int) -> dict[str, tuple[int, Callable[[], float]]]:
        """name -> (neurons per round, run one round and return its seconds)."""
        if self.process is None:
            return {}
        found: dict[str, tuple[int, Callable[[], float]]] = {}
        for op, count in SLOW.items():
            found[LABELS[op]] = (count, lambda op=op, count=count: self.ask(op=op, layer=middle, count=count)["seconds"])
        for op in ("suffix-eager", "suffix-compile"):
            found[LABELS[op]] = (len(layers) * self.neurons, lambda op=op: self._suffix(op, layers))
        return found

    def _suffix(self, op: str, layers: list[int]) -> float:
        return sum(self.ask(op=op, layer=layer, count=self.neurons)["seconds"] for layer in layers)

    def agreement(self, subject: Subject, layer: int) -> float | None:
        """Largest absolute difference between the engine and forward hooks over a few neurons of one layer."""
        if self.process is None or subject.model.name.startswith("random"):
            return None
        theirs = np.asarray(self.ask(op="hooks-one", layer=layer, count=8)["effects"])
        return float(np.abs(engine(subject, [layer])[0, : len(theirs)] - theirs).max())

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
