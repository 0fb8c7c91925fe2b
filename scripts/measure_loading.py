"""Peak host memory of loading a sharded checkpoint of real Llama shapes, on one device and on eight.

python scripts/measure_loading.py --shape llama-3.2-1b --append BENCHMARKS.md

Writes a synthetic bfloat16 checkpoint (random weights, several safetensors files) into a temporary folder, loads it in a fresh process per
mesh, and compares the peak resident memory with the bound: parameter bytes held by the process x 1.25 + 1 GiB. Exit code 1 beyond it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxmed.bench.shapes import SHAPES
from jaxmed.models.checkpoints.tensors import expected_tensors, needed_rules
from jaxmed.models.config import ModelConfig
from jaxmed.models.families import FAMILIES
from jaxmed.models.families.llama import llama_json
from jaxmed.runs.provenance import short_commit

MESHES = {"data=1": 1, "data=1,tensor=8": 8, "data=2,tensor=4": 8, "data=2,fsdp=2,tensor=2": 8}
"""Mesh -> devices of the process."""

CHILD = """
import json, resource, sys, time
import jax
from jaxmed.distributed import make_mesh
from jaxmed.models.load import load
mesh = make_mesh(sys.argv[2])
before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
model = load(sys.argv[1], "bfloat16", mesh=mesh)
jax.block_until_ready(model.params)
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(model.params) for shard in leaf.addressable_shards)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - begun, "held": held, "peak": peak * 1024}))
"""


def write_checkpoint(folder: Path, config: ModelConfig, files: int = 8) -> int:
    """A random checkpoint in `files` safetensors files; its bytes."""
    (folder / "config.json").write_text(json.dumps(llama_json(config)))
    tensors = [pair for rule in needed_rules(FAMILIES["llama"], config) for pair in expected_tensors(rule, config)]
    rng, where, total = np.random.default_rng(0), {}, 0
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {key: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for key, shape in tensors[number::files]}
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
        total += sum(array.nbytes for array in part.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return total


def main() -> int:
    """Measures every mesh; 1 where a bound is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--append", type=Path, help="Markdown file to add a section to")
    given = parser.parse_args()
    lines, failed = [], False
    with tempfile.TemporaryDirectory() as scratch:
        total = write_checkpoint(Path(scratch), SHAPES[given.shape])
        for mesh, devices in MESHES.items():
            flags = f"--xla_force_host_platform_device_count={devices}"
            child = [sys.executable, "-c", CHILD, scratch, mesh]
            done = subprocess.run(child, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            found = json.loads(done.stdout.splitlines()[-1])
            bound = 1.25 * found["held"] + 2**30
            failed |= found["peak"] > bound
            gib = {key: value / 2**30 for key, value in {**found, "bound": bound}.items()}
            lines.append(
                f"{mesh} ({devices} devices): parameters held {gib['held']:.2f} GiB, peak {gib['peak']:.2f} GiB "
                f"(bound {gib['bound']:.2f}), {found['seconds']:.0f} s"
            )
            print(lines[-1], flush=True)
    if given.append:
        title = f"\n## {datetime.date.today()}, commit {short_commit()}, peak host memory of loading\n\n"
        command = f"`python scripts/measure_loading.py --shape {given.shape}`"
        what = f"{command}: a synthetic bfloat16 checkpoint of {total / 2**30:.2f} GiB in 8 files\n\n"
        with given.append.open("a", encoding="utf-8") as handle:
            handle.write(title + what + "".join(f"- {line}\n" for line in lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
