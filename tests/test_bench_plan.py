"""`jaxmed bench plan`: every kind of work is run as often as it is said, and its plan is the command's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxmed.bench import planned
from jaxmed.cli.bench import BenchPlan
from jaxmed.errors import UserError
from jaxmed.models.model import Model


def test_plans_are_held_against_what_the_work_takes(
    plain_model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    clock = iter(range(1000))

    def case(name: str, seconds: float) -> planned.Case:
        return planned.Case(name, 10.0 * seconds, lambda: 10.0, lambda out: ran.append(name if not any(out.iterdir()) else "used folder"))

    monkeypatch.setattr(planned, "make_cases", lambda model: [case("as planned", 1.0), case("twice as long", 0.5)])
    monkeypatch.setattr(planned, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    found = planned.measure_plans(plain_model, 2, tmp_path / "rows.md")
    assert found == {"as planned": (1.0, 1.0), "twice as long": (0.5, 2.0)}
    assert ran == ["as planned"] * 3 + ["twice as long"] * 3
    said = capsys.readouterr().out
    assert "1 of 2 within 25% of their plans" in said
    assert said.strip().splitlines()[-1] in (tmp_path / "rows.md").read_text()


def test_a_bench_without_a_round_is_refused_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BenchPlan, "load", lambda self: pytest.fail("loaded"))
    with pytest.raises(UserError, match="--rounds 0 leaves nothing to measure"):
        BenchPlan(rounds=0).run()


@pytest.mark.slow
def test_every_kind_of_work_has_a_case(default_model: Model, tmp_path: Path) -> None:
    """The short ones are run, too."""
    cases = planned.make_cases(default_model)
    assert len({case.name for case in cases}) == 6
    for case in cases:
        assert case.flops > 1e9, case.name
    for case in (cases[2], cases[-1]):
        case.run(tmp_path)
