"""What a reader must know before quoting a number of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxmed.errors import NOT_FINITE
from jaxmed.reports.record import (
    Record,
    finished_chunks,
    is_partial,
    labels,
    mean_effect,
    mean_total,
    noise_floor,
    select,
    shared_total,
    totals,
    used_pairs,
)
from jaxmed.reports.screen import verified
from jaxmed.reports.style import count, number, percent
from jaxmed.results import NEAR_TIE, near_ties, not_finite
from jaxmed.statistics import mean_interval

LEVEL = 0.05
CLEAR = 10.0  # an effect this many times the noise floor is read without a second thought


@dataclass(frozen=True)
class Caution:
    """A sentence or two; `serious` ones change what may be claimed, the others inform."""

    text: str
    serious: bool = True


def cautions(record: Record) -> list[Caution]:
    """Everything that applies to a run, serious ones first."""
    found = [*_estimates(record), *_progress(record), *_finite(record), *_statistics(record), *_routing(record)]
    for outcome in record.outcomes:
        found += [*_nothing(record, outcome), *_signs(record, outcome), *_noise(record, outcome), *_carrying(record, outcome)]
    return sorted(dict.fromkeys(found), key=lambda caution: not caution.serious)


def _about(record: Record, outcome: str) -> str:
    return f" of {outcome}" if len(record.outcomes) > 1 else ""


def _estimates(record: Record) -> Iterator[Caution]:
    if record.screened:
        parts = ", ".join(f"{percent(verified(record.table, unit))} of {unit}" for unit in record.units)
        yield Caution(
            f"Screened run: exact effects of {parts}; the others are first-order estimates, and NAME_error says how far they may be off. "
            "Means and tests are unbiased, but those of units that are seldom computed have wide errors."
        )
    elif not record.exact:
        method = record.table.attrs["method"]
        yield Caution(
            f"The values are {record.values} (--method {method}), not exact effects. They are read off slopes of the outcome, and are "
            "wrong where it bends: most for whole modules and large changes. Intervals and p values are about the estimates. "
            "Compute what you quote with --method exact; `jaxmed agreement` compares the two."
        )


def _progress(record: Record) -> Iterator[Caution]:
    done = finished_chunks(record)
    if is_partial(record):
        whole = int(done.all(axis=1).sum())
        used = len(used_pairs(record))
        means = f"Means are over {count(used, 'pair')}" if used else "There is nothing to average yet"
        yield Caution(
            f"Partial run: {int(done.sum()):,} of {done.size:,} (pair, layer) chunks are done, {whole} of {len(done)} pairs in full. "
            f"{means}; there are no statistics. Run the same command with --resume to finish it."
        )
    elif not any(f"{unit}_mean" in record.table for unit in record.units):
        yield Caution("The sweep is done, but its statistics were not written: no intervals and no p values. Run it again with --resume.")


def _finite(record: Record) -> Iterator[Caution]:
    wrong = not_finite(record.table)
    if wrong:
        where = ", ".join(f"{name} in {count:,}" for name, count in wrong.items())
        yield Caution(
            f"Numbers that are not finite, in computed (pair, layer): {where}, of {int(finished_chunks(record).sum()):,}. {NOT_FINITE} "
            "Means and statistics leave out what they touch, or are NaN; nothing here is to be quoted."
        )


def _statistics(record: Record) -> Iterator[Caution]:
    attributes = [record.table[f"{unit}_mean"].attrs for unit in record.units if f"{unit}_mean" in record.table]
    if is_partial(record) or not attributes:
        return
    interval, smallest = str(attributes[0].get("interval", "")), attributes[0].get("smallest_p")
    if interval.startswith("none"):
        yield Caution(f"No confidence intervals: {interval.removeprefix('none').lstrip(': ')}.")
    if smallest is not None and smallest > LEVEL:
        yield Caution(
            f"The smallest p that this number of groups can reach is {number(smallest)}: no unit can be significant at {LEVEL}, "
            "however large its effect."
        )


def _routing(record: Record) -> Iterator[Caution]:
    if "routing_margin" not in record.table:
        return
    ties, known = near_ties(record.table)
    if ties:
        smallest = number(float(record.table["routing_margin"].min()))
        yield Caution(
            f"Near-tied routing in {ties:,} of {known:,} (pair, layer): at a patched token, or a later one of the base run, the last used "
            f"expert leads the first unused one by less than {NEAR_TIE} in router logits (smallest lead: {smallest}). An effect of such a "
            "pair may jump by rounding; routing_margin in effects.zarr says where."
        )


def _nothing(record: Record, outcome: str) -> Iterator[Caution]:
    """A total that is nothing, or that may be nothing for other pairs."""
    base, source = totals(record, outcome)
    used, mean = used_pairs(record), mean_total(record, outcome)
    about, floor = _about(record, outcome), noise_floor(record, outcome)
    if abs(mean) <= floor:
        constant = np.ptp(np.concatenate([base[used], source[used]])) <= floor
        level = f"The outcome{about} is {number(float(base[used[0]]))} in base and source of every pair. " if constant else ""
        yield Caution(
            f"{level}The mean total{about} ({number(mean)}) is not above the noise floor ({number(floor)}): there is nothing to have a "
            "share of, and no share is given."
        )
        return
    groups = labels(record, "group")[used]
    by_group = np.asarray([(source - base)[used][groups == name].mean() for name in dict.fromkeys(groups)])
    low, high = (float(end) for end in mean_interval(by_group))
    if low <= 0 <= high:
        yield Caution(
            f"The 95 % interval of the mean total{about}, [{number(low)}, {number(high)}], holds zero: for other pairs the total may be "
            "nothing, or opposite. No share is to be quoted."
        )


def _signs(record: Record, outcome: str) -> Iterator[Caution]:
    base, source = totals(record, outcome)
    total = (source - base)[used_pairs(record)]
    up, down = int((total > 0).sum()), int((total < 0).sum())
    mean = mean_total(record, outcome)
    if up and down:
        yield Caution(
            f"Totals{_about(record, outcome)} disagree in sign: {count(up, 'pair')} positive, {count(down, 'pair')} negative. "
            f"The mean total ({number(mean)}) mixes opposite directions, and so does every share; look at the pairs before quoting a mean."
        )
    if mean < 0:
        yield Caution(
            f"The mean total{_about(record, outcome)} is negative ({number(mean)}): the source moves toward the foil, "
            "so a positive share is an effect toward the foil.",
            serious=False,
        )


def _median(record: Record, unit: str, outcome: str) -> float:
    """Median |effect| over units and layers, then over pairs: one pair in memory at a time."""
    effects = select(record.table[unit], outcome)
    sizes = (np.abs(effects.isel(pair=pair).values) for pair in used_pairs(record))
    medians = [float(np.median(size[np.isfinite(size)])) for size in sizes if np.isfinite(size).any()]
    return float(np.median(medians)) if medians else float("nan")


def _noise(record: Record, outcome: str) -> Iterator[Caution]:
    floor = noise_floor(record, outcome)
    medians = {unit: median for unit in record.units if np.isfinite(median := _median(record, unit, outcome))}
    if not np.isfinite(floor) or not medians:
        return
    ratio = {unit: median / floor if floor else np.inf for unit, median in medians.items()}
    shown = ", ".join(f"{unit} {number(medians[unit])}" + (f" ({number(ratio[unit])} times)" if floor else "") for unit in medians)
    weak = [unit for unit in ratio if ratio[unit] < CLEAR]
    text = f"Noise floor{_about(record, outcome)}: {number(floor)} (largest spread of a pair's base value). Median |effect|: {shown}."
    if weak:
        text += f" The typical effect of {', '.join(weak)} is near the noise floor: values of that size are not to be read one by one."
    yield Caution(text, serious=bool(weak))


def _carrying(record: Record, outcome: str) -> Iterator[Caution]:
    last, total = int(record.table["layer"].values[-1]), shared_total(record, outcome)
    for unit in record.shown("carry"):
        mean = mean_effect(record, unit, outcome).sel(layer=last)
        mean = mean.isel(position=-1) if "position" in mean.dims else mean
        share = float(mean) / total
        at_last = f"its share at the last layer is {number(share)} by identity"
        identity = at_last if abs(share - 1) < 0.01 else "its share grows with depth by construction"
        replaced = f"{unit}{_about(record, outcome)} replaces everything computed up to its layer; {identity}"
        yield Caution(f"{replaced}. No claim about depth rests on it.", serious=False)
