"""Generation against the bare matmuls of its tokens, and against `generate` of transformers, in one run."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.bench.peers import installed
from jaxmed.bench.rows import add_rows
from jaxmed.distributed import device_name
from jaxmed.errors import UserError
from jaxmed.generation import generate_ids
from jaxmed.models.checkpoints.assemble import in_threads
from jaxmed.models.checkpoints.export import export_folder
from jaxmed.models.config import ModelConfig
from jaxmed.models.layers import contract
from jaxmed.models.model import Model
from jaxmed.models.params import Params
from jaxmed.models.transformer import head
from jaxmed.prompts import Example, read_pairs
from jaxmed.runs import watch
from jaxmed.runs.provenance import short_commit
from jaxmed.tokens import prompt_ids

OURS, BARE, THEIRS = "jaxmed", "bare matmuls", "transformers"
WARM = 2
"""Tokens that transformers, which compiles nothing, writes in the round that is not counted."""
Ask = Callable[[list[np.ndarray], int], tuple[float, list[list[int]]]]
"""(prompts, new tokens) -> seconds and the tokens."""


def measure_generate(model: Model, rows: tuple[int, ...], tokens: int, rounds: int, append: Path | None = None) -> list[dict[str, Any]]:
    """Greedy text of `tokens` tokens behind bundled prompts, in batches of `rows`; prints and returns a row of numbers per batch.

    The contestants alternate within a round, after a first round that compiles and is not counted. Ratios are medians over rounds.

    Raises:
        UserError: not one row, token or round.
    """
    check_counts(rows, tokens, rounds)
    rate, found = memory_rate(), []
    with _transformers(model) as theirs:
        for count in rows:
            pairs = read_pairs("harm")
            prompts = [prompt_ids(model.tokenizer, Example(pairs[i % len(pairs)].base)) for i in range(count)]
            found.append(_measure(model, prompts, tokens, rounds, theirs) | {"memory rate": rate})
    lines = [line for one in found for line in _lines(one)]
    watch.lines("generation", lines)
    if append is not None:
        _append(append, model, tokens, rounds, lines)
    return found


def check_counts(rows: tuple[int, ...], tokens: int, rounds: int) -> None:
    """Raises a UserError for less than one row, token or round."""
    if not rows or min(*rows, tokens, rounds) < 1:
        raise UserError(f"Rows {rows}, tokens {tokens} and rounds {rounds} are at least 1.")


def _measure(model: Model, prompts: list[np.ndarray], tokens: int, rounds: int, theirs: Ask | None) -> dict[str, Any]:
    ours = partial(_ours, model)
    contestants: dict[str, Ask] = {OURS: ours, BARE: bare_matmuls(model, len(prompts))} | ({THEIRS: theirs} if theirs else {})
    times: dict[str, list[float]] = {name: [] for name in contestants}
    texts: dict[str, list[list[int]]] = {}
    for number in range(rounds + 1):
        for name, work in contestants.items():
            seconds, texts[name] = work(prompts, tokens if number or name != THEIRS else WARM)
            watch.err.print(f"{len(prompts)} rows, round {number} {name}: {seconds:.2f} s", markup=False)
            if number:
                times[name].append(seconds)
    same = sum(a == b for a, b in zip(texts[OURS], texts.get(THEIRS, []), strict=False))
    found: dict[str, Any] = {"rows": len(prompts), "tokens": tokens, "seconds": times, "same texts": same}
    found["flops"], found["bytes"] = token_cost(model.config, len(prompts))
    found["ratios"] = {name: median(a / b for a, b in zip(times[name], times[OURS], strict=True)) for name in contestants if name != OURS}
    return found


def token_cost(config: ModelConfig, rows: int) -> tuple[float, float]:
    """FLOPs and bytes of the weights' products for one token of every row: the blocks' matrices and the unembedding, read once."""
    weights = config.layers * config.layer_weights + config.vocabulary * config.width
    return 2.0 * rows * weights, float(weights * config.compute.itemsize)


def memory_rate() -> float:
    """Bytes per second that all cores read from memory together."""
    pieces = [np.ones(2**24, np.float32) for _ in range(8)]
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        list(in_threads(lambda at: pieces[at].max(), range(len(pieces))))
        times.append(time.perf_counter() - begun)
    return sum(piece.nbytes for piece in pieces) / median(times)


def _ours(model: Model, prompts: list[np.ndarray], tokens: int) -> tuple[float, list[list[int]]]:
    begun = time.perf_counter()
    written = generate_ids(model, prompts, tokens, stops=[], rows=len(prompts))
    return time.perf_counter() - begun, [ids.tolist() for ids in written]


@partial(jax.jit, static_argnames="config")
def _layer_matmuls(config: ModelConfig, arrays: Params, x: jax.Array) -> jax.Array:
    wide, dtype = config.heads * config.head_width, config.compute
    y = contract("UD,DF->UF", x, arrays["qkv"].reshape(config.width, -1), dtype=dtype)
    y = contract("UF,FD->UD", y[:, :wide], arrays["out"].reshape(wide, -1), dtype=dtype)
    y = contract("UD,DF->UF", y, arrays["gate_up"].reshape(config.width, -1), dtype=dtype)
    return contract("UF,FD->UD", y[:, : config.neurons], arrays["down"], dtype=dtype)


@jax.jit
def _head_matmul(unembedding: jax.Array, x: jax.Array) -> jax.Array:
    return contract("VD,UD->VU", unembedding, x)


def bare_matmuls(model: Model, rows: int) -> Ask:
    """The weights' products of every token, a program per layer on one device, and nothing else. Prompts are not read."""
    config = model.config
    local = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, model.params)
    stacks = {name: np.asarray(local["blocks"][name]) for name in ("qkv", "out", "gate_up", "down")}
    device = local["embedding"].device
    layers = [jax.device_put({name: stack[at] for name, stack in stacks.items()}, device) for at in range(config.layers)]
    x = jax.device_put(jnp.full((rows, config.width), 0.01, config.compute), device)

    def work(prompts: list[np.ndarray], tokens: int) -> tuple[float, list[list[int]]]:
        begun = time.perf_counter()
        for _ in range(tokens):
            y = x
            for arrays in layers:
                y = _layer_matmuls(config, arrays, y)
            jax.block_until_ready(_head_matmul(head(local), y))
        return time.perf_counter() - begun, []

    return work


@contextmanager
def _transformers(model: Model) -> Iterator[Ask | None]:
    """`generate` of transformers on the same weights, in a process of its own; None where PyTorch is not installed."""
    if not installed():
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_folder(model, Path(scratch) / "model")
        command = [sys.executable, "-m", "jaxmed.bench.torch_writer", str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield partial(_theirs, process)
            finally:
                process.terminate()


def _theirs(process: subprocess.Popen[str], prompts: list[np.ndarray], tokens: int) -> tuple[float, list[list[int]]]:
    assert process.stdin is not None
    assert process.stdout is not None
    length = max(map(len, prompts))
    ids = [[0] * (length - len(prompt)) + prompt.tolist() for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    process.stdin.write(json.dumps({"ids": ids, "mask": mask, "count": tokens}) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("The process of transformers ended; what it said is above.")
    answer = json.loads(line)
    return answer["seconds"], answer["tokens"]


def _lines(found: dict[str, Any]) -> list[str]:
    rows, tokens = found["rows"], found["tokens"]
    lines = []
    for name, seconds in found["seconds"].items():
        each = median(seconds) / tokens
        speed = f"{rows / each:,.1f} tokens/s, {each * 1e3:,.1f} ms a step, {found['flops'] / each / 1e9:,.1f} GFLOP/s"
        ratio = f"; {found['ratios'][name]:.2f} x the time of {OURS}" if name in found["ratios"] else ""
        lines.append(f"{rows} rows, {name}: {median(seconds):.2f} s, {speed}, {found['bytes'] / each / 1e9:.1f} GB/s of weights{ratio}")
    bound = found["bytes"] / found["memory rate"] * 1e3
    lines.append(f"{rows} rows, bound by memory: {bound:,.1f} ms a step (weights read once at {found['memory rate'] / 1e9:.1f} GB/s)")
    if THEIRS in found["seconds"]:
        lines.append(f"{rows} rows: {found['same texts']} of {rows} texts are the same as those of {THEIRS}, token for token")
    return lines


def _append(file: Path, model: Model, tokens: int, rounds: int, lines: list[str]) -> None:
    title = f"\n## {datetime.date.today()}, commit {short_commit()}, generation by {model.name}, {device_name(model.mesh)}\n\n"
    about = f"`jaxmed {' '.join(sys.argv[1:])}`\n\n"
    about += f"Greedy, {model.config.dtype}, {tokens} new tokens; medians of {rounds} alternating rounds.\n\n"
    add_rows(file, title + about + "".join(f"- {line}\n" for line in lines))
