"""Fills the empty responses of benign prompts in an examples file with the default model's own answers, cut after a sentence.

    python scripts/answer_benign_prompts.py jaxmed/prompts/data/alignment.jsonl

Fine-tuning on a model's own answers changes least of what it does.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jaxmed as jm
from jaxmed.generation import generate_ids
from jaxmed.prompts import Example
from jaxmed.tokens import prompt_ids

TOKENS = 56


def main(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    empty = [row for row in rows if not row["response"]]
    model = jm.load("smollm2-135m-instruct")
    prompts = [prompt_ids(model.tokenizer, Example(row["prompt"])) for row in empty]
    for row, ids in zip(empty, generate_ids(model, prompts, TOKENS), strict=True):
        text = model.tokenizer.decode(ids).strip()
        cut = re.match(r"(.*[.!?])(?=\s|$)", text, re.DOTALL)
        row["response"] = cut[1] if cut and len(cut[1].split()) >= 4 else text
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
