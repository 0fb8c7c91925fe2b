"""The command `evaluate`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.commands import Config, Dtype, load_model, masked
from jaxmed.errors import UserError
from jaxmed.models.catalog import DEFAULT


@dataclass(frozen=True)
class Evaluate:
    """What a model does with requests (how often it refuses, with intervals), and its perplexity on neutral text."""

    model: str = DEFAULT
    """Known name (see `jaxmed models`), local folder, .gguf file, or Hugging Face name."""
    against: str = ""
    """A model to compare the perplexity with, such as the one that was fine-tuned."""
    examples: str = "alignment"
    """Examples file (.jsonl, .csv, .parquet; column prompt, optional kind, category, split), or a bundled set: alignment."""
    split: Literal["", "train", "heldout"] = "heldout"
    """Rows of this split; empty: all."""
    by: Literal["kind", "category"] = "kind"
    """Column whose values get a rate each."""
    limit: int | None = None
    """The first so many prompts only."""
    tokens: int = 32
    """Most tokens of an answer; answers are greedy."""
    text: str = "neutral"
    """Plain text file for the perplexity, or the bundled one: neutral. Empty: none."""
    save_text: bool = False
    """Keep the answers in --out; else only their hashes are."""
    out: Path | None = None
    """JSON file for every number; must not exist yet."""
    mask: Path | None = None
    """Mask file whose weights are set to zero in memory; see `jaxmed prune`."""
    adapter: Path | None = None
    """LoRA adapter to merge into the weights, as the folder that PEFT saves."""
    raw: bool = False
    """Feed plain text, without the chat template."""
    dtype: Dtype = "float32"
    """Weights and matmuls."""
    mesh: str | None = None
    """Device mesh, such as data=4,model=2; default: all local devices on data."""
    dry_run: bool = False
    """Print the plan and stop."""
    config: Config = None

    def run(self) -> None:
        """Answers, judges, prints."""
        from jaxmed.harm.evaluation import answer, perplexity, perplexity_ratio, refusal_rates

        if self.out is not None and self.out.exists():
            raise UserError(f"--out {self.out} exists already. Give another file; nothing was written.")
        rows = self._rows()
        plan = [f"{len(rows)} answers of up to {self.tokens} tokens from {self.model}, judged by refusal rules"]
        show.lines(
            "evaluate", plan + ([f"perplexity on {self.text}{f', against {self.against}' * bool(self.against)}"] if self.text else [])
        )
        if self.dry_run:
            return
        model = masked(load_model(self.model, self.dtype, None, self.mesh, adapter=self.adapter), self.mask)
        with show.progress("answers", len(rows), "answers") as report:
            texts = answer(model, rows, self.tokens, self.raw, report=lambda count: report(count, count, ""))
        found: dict[str, Any] = {"model": self.model, "weights": model.weights_hash, "edits": list(model.edits)}
        found["refusal_rates"] = [{**asdict(rate), "share": rate.share} for rate in refusal_rates(rows, texts, self.by)]
        if self.text:
            here = perplexity(model, self.text)
            found["perplexity"] = {"value": here.value, "tokens": here.tokens}
            if self.against:
                other = perplexity(load_model(self.against, self.dtype, None, self.mesh), self.text)
                ratio = (None if value != value else value for value in perplexity_ratio(other, here))
                found["perplexity"] |= dict(zip(("ratio", "low", "high"), ratio, strict=True))
                found["perplexity"] |= {"against": other.value}
        self._show(found)
        if self.out is not None:
            kept = texts if self.save_text else [hashlib.sha256(text.encode()).hexdigest() for text in texts]
            found["answers"] = [{"prompt": row.prompt, "answer": text} for row, text in zip(rows, kept, strict=True)]
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")

    def _rows(self) -> Sequence[Any]:
        from jaxmed.prompts import read_examples

        rows = [row for row in read_examples(self.examples, responses=False) if self.split in ("", row.split)][: self.limit]
        if not rows:
            raise UserError(f"{self.examples} holds no rows of split {self.split!r}. Give another --split, or an empty one for all rows.")
        return rows

    def _show(self, found: dict[str, Any]) -> None:
        lines = [
            f"{of['name']}: refuses {of['refused']} of {of['answers']}, {of['share']:.1%} (95 %: {of['low']:.1%} to {of['high']:.1%})"
            for of in found["refusal_rates"]
        ]
        if "perplexity" in found:
            of = found["perplexity"]
            ratio = f", {of['ratio']:.3f} x that of {self.against}" if "ratio" in of else ""
            ratio += f" ({of['low']:.3f} to {of['high']:.3f})" if of.get("low") is not None else ""
            lines.append(f"perplexity on {self.text}: {of['value']:.2f} over {of['tokens']:,} tokens{ratio}")
        show.lines(f"{self.model}, {self.split or 'all'} prompts of {self.examples}", lines)
