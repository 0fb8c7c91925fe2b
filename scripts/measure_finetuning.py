"""Optimiser steps of fine-tuning against the bare matmuls of their shapes and the same loop in PyTorch, in one run.

    python scripts/measure_finetuning.py [--method lora|full] [--rounds 5] [--append BENCHMARKS.md]

The default model on the bundled alignment set, at the sizes of configs/align_smollm2.yaml; where adapters begin above the lowest block,
a step of the second epoch (what the blocks below give is kept). Bare matmuls are all products of a step with weights, adapters and the
unembedding, forward and backward, at the shapes of the step; attention's own products are not among them. PyTorch (transformers, and
peft for adapters) runs in a process of its own on the same examples, padded as a batch; its logits are those of all tokens, as in the
usual loop.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ABOUT = """Seconds per optimiser step, medians of alternating rounds; ratios are medians of per-round ratios (above 1: ours is faster).
Bare matmuls: products with the weights, the adapters and the unembedding, every device for itself. (Rows up to 12d5e08ef03e left the
adapters out, and of full fine-tuning counted the sum over devices of every gradient: their bare times cannot be compared with these.)"""


def torch_side() -> None:
    """Answers every line of stdin with the seconds of one step."""
    import torch
    import transformers

    given = json.loads(sys.stdin.readline())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    if given["adapter"]:
        import peft

        model = peft.PeftModel.from_pretrained(model, given["adapter"], is_trainable=True)
    model.train()
    optimiser = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-4)
    ids, labels = (torch.as_tensor(given[name]) for name in ("ids", "labels"))
    mask = torch.as_tensor(given["mask"])
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        optimiser.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([value for value in model.parameters() if value.requires_grad], 1.0)
        optimiser.step()
        print(json.dumps({"seconds": time.perf_counter() - begin, "loss": float(loss.detach())}), flush=True)


def padded(job: Any, group: np.ndarray) -> dict[str, Any]:
    """The examples of a step as a batch padded at the right."""
    longest = max(len(job.examples[i].ids) for i in group)
    ids, labels, mask = np.zeros((len(group), longest), int), np.full((len(group), longest), -100), np.zeros((len(group), longest), int)
    for row, i in enumerate(group):
        one = job.examples[i]
        ids[row, : len(one.ids)], mask[row, : len(one.ids)] = one.ids, 1
        labels[row, one.prompt : len(one.ids)] = one.ids[one.prompt :]
    return {"ids": ids.tolist(), "labels": labels.tolist(), "mask": mask.tolist()}


def bare_matmuls(job: Any) -> Any:
    """One jitted function of the products of a step alone, over its layers and devices: forward, and what the gradient needs."""
    import jax
    import jax.numpy as jnp

    from jaxmed.finetuning.lora import lay_out, new_factors
    from jaxmed.models.layers import contract
    from jaxmed.models.params import MATRICES
    from jaxmed.models.transformer import blocks_from, head

    model, settings, full = job.model, job.settings, job.settings.method == "full"
    rows, scored = job.shape.rows * job.shape.length, job.shape.rows * job.shape.scored
    placed = jax.NamedSharding(model.mesh, jax.P("data"))
    flat = {name: np.prod(model.params["blocks"][name].shape[1 : 1 + inputs]) for name, inputs in MATRICES.items()}
    sides = {name: (int(flat[name]), int(np.prod(model.params["blocks"][name].shape[1:]) // flat[name])) for name in MATRICES}
    wide = {size: jax.device_put(np.ones((rows, size), np.float32), placed) for sides_of in sides.values() for size in sides_of}
    last = jax.device_put(np.ones((scored, model.config.width), np.float32), placed)
    blocks = blocks_from({name: model.params["blocks"][name] for name in sides}, settings.first_layer)
    factors = {} if full else lay_out(model.config, settings.lora, new_factors(model.config, settings.lora, 0))

    def forward_and_back(total: Any, x: Any, weight: Any, out: Any, trained: bool) -> Any:
        found = total + contract("UD,DV->UV", x, weight)[0, 0] + contract("UV,DV->UD", out, weight)[0, 0]
        if not trained:
            return found
        x, out = (x + total, out) if x.shape[1] < out.shape[1] else (x, out + total)  # or it would be computed once for all layers
        return found + (contract("UV,UD->VD", out, x) if out.shape[1] < x.shape[1] else contract("UD,UV->DV", x, out))[0, 0]

    def products(stacks: Any, unembedding: Any, wide: Any, last: Any) -> Any:
        def layer(total: Any, arrays: Any) -> Any:
            for name, (inputs, outputs) in sides.items():
                x, out = wide[inputs], wide[outputs]
                total = forward_and_back(total, x, arrays[0][name].reshape(inputs, outputs), out, full)
                if name in arrays[1]:
                    down, up = arrays[1][name][0].reshape(inputs, -1), arrays[1][name][1].reshape(-1, outputs)
                    between = x[:, : down.shape[1]]
                    total = forward_and_back(total, x, down, between, True)
                    total = forward_and_back(total, between, up, out, True)
            return total * 1e-9, None

        total, _ = jax.lax.scan(layer, jnp.zeros(()), stacks)
        logits = contract("UD,VD->UV", last + total, unembedding)
        total = contract("UV,VD->UD", logits, unembedding)[0, 0]
        return total + contract("UV,UD->VD", logits, last)[0, 0] if full else total

    whole, rows_of = jax.P(), jax.P("data")
    alone = lambda *given: products(*given)[None]  # noqa: E731 - every device for itself: sums over devices are no products
    jitted = jax.jit(jax.shard_map(alone, mesh=model.mesh, in_specs=(whole, whole, rows_of, rows_of), out_specs=rows_of, check_vma=False))
    return lambda: jitted((blocks, factors), head(model.params), wide, last).block_until_ready()


def our_side(method: str) -> tuple[Any, Any]:
    """The checked job of the config with another method, and one optimiser step as a function that returns its loss."""
    import yaml

    import jaxmed as jm
    from jaxmed.finetuning.feed import Feed
    from jaxmed.finetuning.job import make_job
    from jaxmed.finetuning.settings import read_recipe
    from jaxmed.finetuning.train import make_optimiser, make_step, start

    config = Path(__file__).parents[1] / "configs" / "align_smollm2.yaml"
    model = jm.load("smollm2-135m-instruct")
    entries = {"method": method, "strength": 1.0} | ({"first_layer": 0} if method == "full" else {})
    recipe = read_recipe(yaml.safe_load(config.read_text()) | entries)
    job = make_job(model, *recipe.examples(), recipe.settings)
    optimiser = make_optimiser(job.settings, job.steps)
    trained, state, frozen, moved = start(model, job.settings, optimiser)
    step = make_step(model.config, job.settings, optimiser, model.mesh, moved)
    batch = Feed(job).batch(0)

    def run() -> float:
        nonlocal trained, state
        trained, state, found = step(trained, state, frozen, batch)
        return float(found["loss"])

    return job, run


@contextmanager
def their_side(job: Any) -> Iterator[Any]:
    """A function that runs one step of PyTorch's loop, in a process of its own, and returns its seconds and loss."""
    import jaxmed as jm
    from jaxmed.finetuning.lora import new_factors, save_adapter

    with tempfile.TemporaryDirectory() as folder:
        jm.export_folder(job.model, Path(folder) / "model")
        adapter, lora = "", job.settings.lora
        if job.settings.method == "lora":
            fresh = new_factors(job.model.config, lora, job.settings.seed)
            adapter = str(save_adapter(job.model, fresh, lora, Path(folder) / "adapter"))
        command = [sys.executable, __file__, "--torch-side"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def say(text: str) -> None:
            asked.write(text + "\n")
            asked.flush()

        def run() -> dict[str, float]:
            say("step")
            return json.loads(answers.readline())

        say(json.dumps({"model": f"{folder}/model", "adapter": adapter, **padded(job, job.order[0])}))
        assert answers.readline().strip() == "ready"
        try:
            yield run
        finally:
            process.kill()


REST = 0.5
"""Seconds between contestants: the threads of the one before still spin for a while."""


def timed(run: Any) -> tuple[float, Any]:
    """The seconds of a call, after a rest, and what it returns."""
    time.sleep(REST)
    begin = time.perf_counter()
    found = run()
    return time.perf_counter() - begin, found


def measure(job: Any, ours: Any, rounds: int) -> list[dict[str, float]]:
    """Seconds of every contestant, round by round; the first round compiles and is left out."""
    bare, found = bare_matmuls(job), []
    with their_side(job) as theirs:
        for number in range(rounds + 1):
            seconds, loss = timed(ours)
            matmuls, _ = timed(bare)
            _, other = timed(theirs)
            found.append({"ours": seconds, "bare": matmuls, "torch": other["seconds"]})
            shown = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found[-1].items())
            print(f"round {number}: {shown}; losses {loss:.4f}, {other['loss']:.4f}", flush=True)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--append", type=Path)
    arguments = parser.parse_args()

    from jaxmed.distributed import device_name
    from jaxmed.finetuning.job import step_flops
    from jaxmed.runs.provenance import short_commit

    job, ours = our_side(arguments.method)
    rounds = measure(job, ours, arguments.rounds)
    of = {name: median(one[name] for one in rounds) for name in rounds[0]}
    ratio = {name: median(one[name] / one["ours"] for one in rounds) for name in ("bare", "torch")}
    tokens = sum(len(job.examples[i].ids) for i in job.order[0])
    row = (
        f"| {arguments.method} | {job.shape.rows} x {job.shape.length} | {of['ours']:.2f} | {tokens / of['ours']:.0f} | {of['bare']:.2f} | "
        f"{ratio['bare']:.2f} | {of['torch']:.2f} | {ratio['torch']:.2f} | {step_flops(job) / of['ours'] / 1e9:.0f} |"
    )
    print(row)
    if arguments.append:
        title = f"\n## {datetime.date.today()}, commit {short_commit()}, fine-tuning on {device_name(job.model.mesh)}\n\n"
        head_row = "| method | rows x tokens | s/step | tokens/s | bare matmuls s | bare / ours | PyTorch s | PyTorch / ours | GFLOP/s |\n"
        text = title + f"`python scripts/measure_finetuning.py --method {arguments.method} --rounds {arguments.rounds}`. {ABOUT}\n\n"
        with arguments.append.open("a", encoding="utf-8") as handle:
            handle.write(text + head_row + "|---" * 9 + "|\n" + row + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--torch-side"]:
        torch_side()
    else:
        main()
