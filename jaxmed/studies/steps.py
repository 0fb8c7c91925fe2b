"""A study is a list of steps: each says what it needs, what it costs and how it is run, and is resumed by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmed.errors import UserError
from jaxmed.runs.cost import Cost


@dataclass(frozen=True)
class Step:
    """A part of a study.

    Attributes:
        name: what it measures, in words; unique.
        needs: names of the steps whose results it reads.
        cost: what it takes, for the plan.
        run: measures what is not on the disk yet; gets the study in its folder.
    """

    name: str
    needs: tuple[str, ...]
    cost: Cost
    run: Callable[[Any], None]


Study = Sequence[Step]


def run_steps(study: Study, folder: Any) -> None:
    """Runs every step in its order.

    Raises:
        UserError: two steps of one name, or a step that needs what does not come before it.
    """
    done: set[str] = set()
    for step in study:
        missing = [name for name in step.needs if name not in done]
        if missing or step.name in done:
            reason = f"needs {missing[0]!r}, which does not come before it" if missing else "comes twice"
            raise UserError(f"The step {step.name!r} {reason}.")
        done.add(step.name)
    for step in study:
        step.run(folder)
