"""Differences from transformers for every family, on the tiny random models of the tests, as a table for BENCHMARKS.md.

python scripts/measure_parity.py --append BENCHMARKS.md
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import jaxmed as jm
from jaxmed.interventions.sites import SITES
from jaxmed.runs.provenance import short_commit
from tests import reference

ABOUT = """Float32: largest absolute difference of logits (the prompt is longer than every sliding window and RoPE threshold of the tiny
configs), and of any site relative to its largest value. bfloat16: root mean square distance of a
token's logits from the reference's float32 logits, the median over tokens: ours, and the reference's own (eager and fused attention)."""


def measure(name: str, folder: Path) -> list[str]:
    """One row of the table."""
    made, ids = reference.save(name, folder / "float32"), reference.tokens(90)
    logits, found = jm.forward(jm.load(str(folder / "float32")), ids, taps=tuple(SITES))
    wanted = reference.logits(made, ids)
    worst = 0.0
    for site, there in reference.sites(made, ids).items():
        apart = np.abs(np.asarray(found[site]).reshape(there.shape) - there).max()
        worst = max(worst, float(apart / max(1.0, np.abs(there).max())))
    narrow = reference.save(name, folder / "bfloat16", reference.torch.bfloat16)
    paths = reference.bfloat16_paths(narrow, ids)
    exact = reference.logits(narrow.float(), ids)
    ours = np.asarray(jm.forward(jm.load(str(folder / "bfloat16"), dtype="bfloat16"), ids)[0])
    apart = float(np.abs(np.asarray(logits) - wanted).max())
    figures = [apart, worst, *(reference.typical_distance(path, exact) for path in (ours, *paths))]
    return [name, *(f"{value:.1e}" for value in figures), *["none"] * (2 - len(paths))]


def main() -> None:
    """Measures every family and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="families to measure; default: all")
    parser.add_argument("--append", type=Path, help="Markdown file to add the table to")
    given = parser.parse_args()
    head = ["family", "logits, float32", "worst site, float32", "bfloat16, ours", "bfloat16, eager", "bfloat16, fused"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in given.families or reference.CONFIGS:
        with tempfile.TemporaryDirectory() as scratch:
            lines.append("| " + " | ".join(measure(name, Path(scratch))) + " |")
        print(lines[-1], flush=True)
    if given.append:
        version = reference.transformers.__version__
        title = f"\n## {datetime.date.today()}, commit {short_commit()}, parity with transformers {version}\n\n"
        about = (
            "`python scripts/measure_parity.py --append BENCHMARKS.md`; tiny random models, 90 tokens. " + " ".join(ABOUT.split()) + "\n\n"
        )
        with given.append.open("a", encoding="utf-8") as handle:
            handle.write(title + about + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
