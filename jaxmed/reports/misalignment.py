"""The page of a study of emergent misalignment: the claims one by one, then rates by model, by question, and in-domain losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from jaxmed.files import read_csv
from jaxmed.reports.style import CATEGORICAL, INK, Figure, canvas, label, number
from jaxmed.reports.verdicts import finished_run, write_verdicts

LEAD = (
    "A model is fine-tuned on a narrow set, and asked free-form questions that have nothing to do with it. Then the weights that carry the "
    "tuned model's narrow answers are removed from the original, which is tuned again until its loss on the narrow set is the same. An "
    "answer is misaligned where its alignment is low and it is coherent. Intervals are over questions, means over seeds."
)
RATES = (
    "Misaligned and coherent answers to the free-form questions: mean over seeds, 95 % intervals over questions; points: single seeds. "
    "original: as it is; tuned: fine-tuned; the others are pruned first, for the behaviour, at random with the same counts per matrix, and "
    "for another behaviour with the same counts."
)
TRADE = (
    "Every model of every seed: its loss on held-out rows of the narrow set (mean over rows) against its rate of misaligned answers "
    "elsewhere. What counts is the height at the same loss."
)
BY_QUESTION = "Misaligned answers to every question, mean over its forms, samples and seeds."
PROFILE = (
    "Mean effect of swapping a layer's whole attention or MLP output for that of the pair's other prompt, in every model; means over "
    "seeds; error bars of the original: 95 % intervals over groups of pairs. Models beside original, tuned and pruned are hidden at "
    "first; click their names to show them."
)
TABLES = ("rates.csv", "models.csv")
"""Tables that the page shows; the others are too long for it."""
EFFECT = ("effect", "effect_low", "effect_high")
SHOWN = ("original", "tuned", "pruned")
Rows = Sequence[dict[str, str]]


def write_misalignment(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a study's folder (default: its report.html), and returns its path. The file works offline.

    Raises:
        UserError: a folder without a finished study.
    """
    manifest = finished_run(folder, "misalignment", "study misalignment")["manifest"]
    spec, rates, models = manifest["misalignment"], read_csv(folder / "rates.csv"), read_csv(folder / "models.csv")
    answers = read_csv(folder / "answers.csv")
    drawn = [
        Figure("Answers out of the domain", RATES, _draw_rates(rates, _by_seed(answers))),
        Figure("By question", BY_QUESTION, _draw_questions(answers)),
        Figure("In the domain and out of it", TRADE, _draw_trade(models, _by_seed(answers))),
        *_profile_figures(folder / "profiles.csv"),
    ]
    facts = [
        ("Narrow set", spec["narrow"]),
        ("Control", spec["control"] or "none"),
        ("Judge", manifest["judging"]["judge"]),
        ("Questions", f"{rates[0]['questions']} in {len({row['variant'] for row in answers})} forms, {spec['samples']} samples"),
        ("Seeds", str(spec["seeds"])),
        ("q, p", f"{spec['q']:g}, {spec['p']:g}"),
    ]
    shown = ("misalignment", "judging", "model")
    tables = [folder / name for name in TABLES]
    return write_verdicts(folder, out, f"Emergent misalignment in {manifest['model']['name']}", LEAD, facts, drawn, tables, shown)


def _mean(rows: Rows, column: str) -> float:
    values = [float(row[column]) for row in rows if row[column] not in ("", "nan")]
    return sum(values) / len(values) if values else float("nan")


def _by_seed(answers: Rows) -> dict[tuple[str, str], dict[str, float]]:
    """(model, seed) -> rates."""
    parts: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in answers:
        parts.setdefault((row["model"], row["seed"]), []).append(row)
    return {key: {column: _mean(rows, column) for column in ("misaligned", "coherent")} for key, rows in parts.items()}


def _draw_rates(rates: Rows, seeds: dict[tuple[str, str], dict[str, float]]) -> go.Figure:
    figure = canvas(380, "", "rate of answers")
    for at, column in enumerate(("misaligned", "coherent")):
        value = [float(row[column]) for row in rates]
        ends = {which: [float(row[f"{column}_{which}"] or "nan") for row in rates] for which in ("low", "high")}
        bars = {
            "type": "data",
            "symmetric": False,
            "thickness": 1,
            "array": [high - v for high, v in zip(ends["high"], value, strict=True)],
        }
        bars["arrayminus"] = [v - low for low, v in zip(ends["low"], value, strict=True)]
        colour = {"color": CATEGORICAL[at]}
        figure.add_trace(go.Bar(x=[row["model"] for row in rates], y=value, error_y=bars, name=column, marker=colour))
    points = {"symbol": "circle-open", "color": INK}
    own = {"x": [model for model, _ in seeds], "y": [one["misaligned"] for one in seeds.values()]}
    figure.add_trace(go.Scatter(**own, mode="markers", name="misaligned, single seeds", marker=points))
    figure.update_layout(barmode="group")
    figure.update_yaxes(range=[0, 1.02])
    return figure


def _draw_questions(answers: Rows) -> go.Figure:
    models, questions = (list(dict.fromkeys(row[column] for row in answers)) for column in ("model", "question"))
    values = [
        [_mean([row for row in answers if (row["model"], row["question"]) == (model, one)], "misaligned") for one in questions]
        for model in models
    ]
    figure = canvas(120 + 40 * len(models), "", "")
    figure.add_trace(
        go.Heatmap(
            x=[label(one) for one in questions], y=models, z=values, zmin=0, zmax=1, colorscale="Blues", colorbar={"title": "misaligned"}
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    figure.update_xaxes(automargin=True, type="category")
    return figure


def _draw_trade(models: Rows, seeds: dict[tuple[str, str], dict[str, float]]) -> go.Figure:
    figure = canvas(360, "in-domain loss, nats per token", "misaligned out of the domain")
    for at, name in enumerate(dict.fromkeys(row["model"] for row in models)):
        mine = [row for row in models if row["model"] == name]
        own = {"x": [float(row["domain_loss"]) for row in mine], "y": [seeds[name, row["seed"]]["misaligned"] for row in mine]}
        told = [f"seed {row['seed']}: {row['steps']} steps, ended at {number(row['tuned_to'])}" for row in mine]
        figure.add_trace(go.Scatter(**own, mode="markers", name=name, text=told, marker={"color": CATEGORICAL[at], "size": 9}))
    return figure


def _profile_figures(file: Path) -> list[Figure]:
    """The mediation profile of every model, a figure per place; none where it was not measured."""
    rows = [row for row in read_csv(file) if row["layer"]] if file.is_file() else []
    titles = {"read": "Mediation where the request is read", "written": "Mediation where the answer is written"}
    return [Figure(titles[place], PROFILE, _draw_profile([row for row in rows if row["place"] == place])) for place in titles if rows]


def _draw_profile(rows: Rows) -> go.Figure:
    figure = canvas(400, "layer", "mean effect")
    for at, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        for dash, unit in zip(("solid", "dot"), dict.fromkeys(row["unit"] for row in rows), strict=False):
            mine = [row for row in rows if (row["model"], row["unit"]) == (model, unit)]
            layers = sorted({int(row["layer"]) for row in mine})
            value, low, high = ([_mean([r for r in mine if int(r["layer"]) == layer], name) for layer in layers] for name in EFFECT)
            bars = {"type": "data", "symmetric": False, "thickness": 1, "array": [h - v for h, v in zip(high, value, strict=True)]}
            bars["arrayminus"] = [v - lo for v, lo in zip(value, low, strict=True)]
            look = {"color": CATEGORICAL[at % len(CATEGORICAL)], "dash": dash}
            own = {
                "x": layers,
                "y": value,
                "name": f"{model}, {label(unit)}",
                "line": look,
                "error_y": bars if model == "original" else None,
            }
            figure.add_trace(go.Scatter(**own, mode="lines+markers", visible=True if model in SHOWN else "legendonly"))
    return figure
