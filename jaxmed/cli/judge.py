"""Flags that choose a judge, shared by the commands that judge answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmed.cli.flags import SourceFlags
from jaxmed.errors import UserError
from jaxmed.evaluation.judges import JudgeSettings, find_judge, make_judge


def _kept(out: Path | None) -> Path | None:
    return None if out is None else out.with_name(out.name + ".scores.jsonl")


@dataclass(frozen=True, kw_only=True)
class JudgeFlags(JudgeSettings):
    """Who says what an answer is worth."""

    def judge_lines(self) -> list[str]:
        """The judge in the plan, and what the user is warned of."""
        return find_judge(self.judge).lines(self)

    def check_judge(self, out: Path | None) -> None:
        """Raises a UserError for flags and files of the judge that are missing or do not fit; loads no model."""
        if self.judge == "http" and out is None:
            raise UserError("Give --out with an endpoint: its scores are kept beside it, so that nothing is asked twice.")
        find_judge(self.judge).check(self, _kept(out))

    def make_judge(self, out: Path | None, keep_text: bool, mesh: str | None) -> Any:
        """The judge; scores of an endpoint are kept in a file beside `out`, the command's result. Raises what `judges.make_judge` does."""

        def load(name: str, dtype: Any, adapter: Path | None) -> Any:
            return SourceFlags(model=name, dtype=dtype, adapter=adapter, mesh=mesh).load()

        return make_judge(self, _kept(out), keep_text, load)
