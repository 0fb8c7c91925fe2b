"""Optimiser steps of fine-tuning against the bare matmuls of their shapes and the same loop in PyTorch, in one run.

    python scripts/measure_finetuning.py [--method lora|full] [--rounds 5] [--append BENCHMARKS.md]

The default model on the bundled alignment set, at the sizes of configs/align_smollm2.yaml. PyTorch (transformers, and peft for
adapters) runs in a process of its own on the same examples, padded as a batch; its logits are those of all tokens, as in the usual loop.
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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ABOUT = """Seconds per optimiser step, medians of alternating rounds; ratios are medians of per-round ratios (above 1: ours is faster)."""


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
    """One jitted function of the products of a step alone, over all layers and devices: forward, and what the gradient needs."""
    import jax
    import jax.numpy as jnp

    from jaxmed.models.layers import contract
    from jaxmed.models.transformer import MATRICES, head

    model, full = job.model, job.settings.method == "full"
    rows, scored = job.shape.rows * job.shape.length, job.shape.rows * job.shape.scored
    placed = jax.NamedSharding(model.mesh, jax.P("data"))
    flat = {name: np.prod(model.params["blocks"][name].shape[1 : 1 + inputs]) for name, inputs in MATRICES.items()}
    sides = {name: (int(flat[name]), int(np.prod(model.params["blocks"][name].shape[1:]) // flat[name])) for name in MATRICES}
    wide = {size: jax.device_put(np.ones((rows, size), np.float32), placed) for sides_of in sides.values() for size in sides_of}
    last = jax.device_put(np.ones((scored, model.config.width), np.float32), placed)

    def products(blocks: Any, unembedding: Any, wide: Any, last: Any) -> Any:
        def layer(total: Any, arrays: Any) -> Any:
            for name, (inputs, outputs) in sides.items():
                weight = arrays[name].reshape(inputs, outputs)
                x, out = wide[inputs] + total, wide[outputs] + total
                total += contract("UD,DV->UV", x, weight)[0, 0] + contract("UV,DV->UD", out, weight)[0, 0]
                if full:
                    total += contract("UD,UV->DV", x, out)[0, 0]
            return total * 1e-9, None

        total, _ = jax.lax.scan(layer, jnp.zeros(()), {name: blocks[name] for name in sides})
        logits = contract("UD,VD->UV", last + total, unembedding)
        total = contract("UV,VD->UD", logits, unembedding)[0, 0]
        return total + contract("UV,UD->VD", logits, last)[0, 0] if full else total

    jitted = jax.jit(products)
    return lambda: jitted(model.params["blocks"], head(model.params), wide, last).block_until_ready()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--append", type=Path)
    arguments = parser.parse_args()

    import jax
    import yaml

    import jaxmed as jm
    from jaxmed.distributed import device_name
    from jaxmed.finetuning.job import check, step_flops
    from jaxmed.finetuning.lora import save_adapter
    from jaxmed.finetuning.settings import read_recipe
    from jaxmed.finetuning.train import make_optimiser, make_step, start
    from jaxmed.provenance import commit

    config = Path(__file__).parents[1] / "configs" / "align_smollm2.yaml"
    model = jm.load("smollm2-135m-instruct")
    recipe = read_recipe(yaml.safe_load(config.read_text()) | {"method": arguments.method})
    job = check(model, *recipe.examples(), recipe.settings)
    optimiser = make_optimiser(job.settings, job.steps)
    trained, state, frozen, moved = start(model, job.settings, optimiser)
    step = make_step(model.config, job.settings, optimiser, moved)
    batch = jax.device_put(job.batch(0), jax.NamedSharding(model.mesh, jax.P(None, "data")))
    bare = bare_matmuls(job)
    with tempfile.TemporaryDirectory() as folder:
        jm.export_folder(model, Path(folder) / "model")
        adapter = ""
        if arguments.method == "lora":
            adapter = str(save_adapter(model, trained, job.settings.lora, Path(folder) / "adapter"))
        command = [sys.executable, __file__, "--torch-side"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"model": f"{folder}/model", "adapter": adapter, **padded(job, job.order[0])}) + "\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "ready"
        rounds: list[dict[str, float]] = []
        for number in range(arguments.rounds + 1):  # the first compiles
            begin = time.perf_counter()
            trained, state, found = step(trained, state, frozen, batch)
            loss = float(found["loss"])
            ours = time.perf_counter() - begin
            begin = time.perf_counter()
            bare()
            alone = time.perf_counter() - begin
            process.stdin.write("step\n")
            process.stdin.flush()
            theirs = json.loads(process.stdout.readline())
            print(f"round {number}: ours {ours:.2f} s (loss {loss:.4f}), bare matmuls {alone:.2f} s, PyTorch {theirs['seconds']:.2f} s "
                  f"(loss {theirs['loss']:.4f})", flush=True)  # fmt: skip
            if number:
                rounds.append({"ours": ours, "bare": alone, "torch": theirs["seconds"]})
        process.kill()
    of = {name: median(one[name] for one in rounds) for name in rounds[0]}
    ratio = {name: median(one[name] / one["ours"] for one in rounds) for name in ("bare", "torch")}
    tokens = sum(len(job.examples[i].ids) for i in job.order[0])
    row = (
        f"| {arguments.method} | {job.shape.rows} x {job.shape.length} | {of['ours']:.2f} | {tokens / of['ours']:.0f} | {of['bare']:.2f} | "
        f"{ratio['bare']:.2f} | {of['torch']:.2f} | {ratio['torch']:.2f} | {step_flops(job) / of['ours'] / 1e9:.0f} |"
    )
    print(row)
    if arguments.append:
        title = f"\n## {datetime.date.today()}, commit {(commit() or 'unknown')[:12]}, fine-tuning on {device_name(model.mesh)}\n\n"
        head_row = "| method | rows x tokens | s/step | tokens/s | bare matmuls s | bare / ours | PyTorch s | PyTorch / ours | GFLOP/s |\n"
        text = title + f"`python scripts/measure_finetuning.py --method {arguments.method} --rounds {arguments.rounds}`. {ABOUT}\n\n"
        with arguments.append.open("a", encoding="utf-8") as handle:
            handle.write(text + head_row + "|---" * 9 + "|\n" + row + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--torch-side"]:
        torch_side()
    else:
        main()
