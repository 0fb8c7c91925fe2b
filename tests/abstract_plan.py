"""A program of its own, for a process with many simulated devices: prints what a chunk of a published shape takes on a mesh, as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import jaxmed as jm
from jaxmed.bench.abstract import compile_chunk
from jaxmed.bench.shapes import SHAPES

if __name__ == "__main__":
    shape, mesh = sys.argv[1:]
    json.dump(asdict(compile_chunk(replace(SHAPES[shape], dtype="bfloat16"), jm.make_mesh(mesh), 1024, 64)), sys.stdout)
