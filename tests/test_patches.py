"""What is written in the place of base values, against full forwards and numpy."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxmed as jm
from jaxmed.effects.contrast import Contrast, Reading, make_contrast, make_contrasts
from jaxmed.effects.cost import plan
from jaxmed.effects.engine import prepare
from jaxmed.effects.job import make_job
from jaxmed.effects.patches import PATCHES, Patching, check_patch, with_patch
from jaxmed.effects.reference import make_reference
from jaxmed.effects.request import Request
from jaxmed.errors import Notice, UserError
from jaxmed.models.model import Model
from jaxmed.reports.record import read
from jaxmed.reports.tables import facts
from jaxmed.runs.folder import read_run
from tests import naive, tiny, tolerances

SITES = ("neuron", "head_out", "mlp_out", "residual_out")
MODEL = cache(tiny.model)
FACTORS: dict[str, float | None] = {"scale": 1.7, "steer": -2.0, "noise": 0.5}


def _contrast(model: Model, pair: jm.PromptPair, position: str, contrast: str = "pair") -> Contrast:
    return make_contrast(model, pair, Reading(contrast, position, "chat", ("log-odds",)))


def _run(model: Model, contrast: Contrast, side: str) -> dict[str, np.ndarray]:
    """Site -> a side's values [L, P, ...] at its patched tokens."""
    run, tokens = getattr(contrast, side), list(getattr(contrast.patches[0], side))
    taps = jm.forward(model, run.ids, taps=SITES)[1]
    return {site: np.asarray(taps[site])[:, 0, tokens] for site in SITES}


def _noise(model: Model, contrasts: list[Contrast], number: int) -> dict[str, np.ndarray]:
    """Random numbers are the package's own; their distribution has a test of its own."""
    patching = check_patch(Patching("noise", FACTORS["noise"], 7))
    reference = make_reference(PATCHES["noise"].needs, contrasts, SITES)
    one = with_patch(prepare(contrasts[number], ("log-odds",), SITES), patching, reference)
    columns = [token - one.start for token in contrasts[number].patches[0].base]
    return {site: np.asarray(one.source[site])[:, columns] for site in SITES}


def _written(model: Model, patch: str, contrasts: list[Contrast], number: int) -> dict[str, np.ndarray]:
    """Site -> what a patch writes at the patched tokens of a pair, [L, P, ...]."""
    if patch == "noise":
        return _noise(model, contrasts, number)
    base, factor = _run(model, contrasts[number], "base"), FACTORS.get(patch)
    runs = {side: [_run(model, one, side) for one in contrasts] for side in ("base", "source")}
    means = {side: {site: np.mean([x[site].mean(1) for x in those], axis=0) for site in SITES} for side, those in runs.items()}
    found = {}
    for site, own in base.items():
        change = (means["source"][site] - means["base"][site])[:, None]
        unit = change / np.linalg.norm(change, axis=-1, keepdims=True)
        along = np.einsum("...i,...i->...", own, np.broadcast_to(unit, own.shape))[..., None]
        rows: dict[str, Any] = {
            "zero": lambda own=own: 0 * own,
            "mean": lambda own=own, site=site: np.broadcast_to(means["source"][site][:, None], own.shape),
            "scale": lambda own=own: own * factor,
            "steer": lambda own=own, change=change: own + factor * change,
            "ablate-direction": lambda own=own, along=along, unit=unit: own - along * unit,
        }
        found[site] = rows[patch]()
    return found


def _edit(written: dict[str, np.ndarray], tokens: list[int], site: str, layer: int, unit: int | None) -> dict[str, jm.Edit]:
    parts = []
    for number, token in enumerate(tokens):
        value = written[site][layer, number] if unit is None else written[site][layer, number, unit]
        parts.append(jm.edits.resample(site, value[None], layer, token, jm.edits.ANY if unit is None else unit))
    return jm.edits.merge(*parts)


CHANGED = [name for name in PATCHES if name != "resample"]
QUICK = {("llama", "mean", "header"), ("post_norm", "noise", "header"), ("mixture", "ablate-direction", "header")}
PLACES = [(kind, patch, "header") for kind in ("llama", "post_norm", "mixture") for patch in CHANGED]
MARKED = [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in PLACES]


@pytest.mark.parametrize(("kind", "patch", "position"), [*(("llama", patch, "last") for patch in CHANGED), *MARKED])
def test_patches_equal_full_forwards(kind: str, patch: str, position: str) -> None:
    model, sets = MODEL(kind), {"two": [("neuron", 0, 3), ("head_out", 1, 1), ("mlp_out", 1)]}
    asked = {"patch": patch, "patch_factor": FACTORS.get(patch), "seed": 7}
    table = jm.sweep(model, tiny.PAIRS, unit=SITES, position=position, sets=sets, **asked)
    contrasts = [_contrast(model, pair, position) for pair in tiny.PAIRS]
    largest = 0.0
    for number, pair in enumerate(tiny.PAIRS):
        tokens, written = list(contrasts[number].patches[0].base), _written(model, patch, contrasts, number)
        base = naive.outcome(model, pair, "base", "log-odds")
        units = [("neuron", 0, 3), ("neuron", 2, 9), ("head_out", 1, 2), ("mlp_out", 2, None), ("residual_out", 1, None)]
        for site, layer, unit in units:
            wanted = naive.outcome(model, pair, "base", "log-odds", _edit(written, tokens, site, layer, unit)) - base
            found = table[site][number, layer] if unit is None else table[site][number, layer, unit]
            assert float(found) == pytest.approx(wanted, abs=tolerances.EFFECTS), (site, pair.id)
            largest = max(largest, abs(wanted))
        parts = [_edit(written, tokens, *one) for one in (("neuron", 0, 3), ("head_out", 1, 1), ("mlp_out", 1, None))]
        wanted = naive.outcome(model, pair, "base", "log-odds", jm.edits.merge(*parts)) - base
        assert float(table.joint[number, 0]) == pytest.approx(wanted, abs=tolerances.EFFECTS)
    assert largest > 10 * tolerances.EFFECTS, "the patches change nothing"
    assert table.attrs["patch"] == patch
    assert table.attrs.get("patch_factor") == FACTORS.get(patch)
    assert check_patch(Patching(patch, FACTORS.get(patch))).told in table.neuron.attrs["formula"]


def test_noise_is_normal_with_the_spread_of_the_site(plain_model: Model) -> None:
    """Standard deviation: the factor times that of all values of a layer, or of the token embeddings."""
    contrasts = [_contrast(plain_model, pair, "header") for pair in tiny.PAIRS]
    embedding, ratios = np.asarray(plain_model.params["embedding"]), {site: [] for site in SITES}
    sources = [_run(plain_model, one, "source") for one in contrasts]
    for number, contrast in enumerate(contrasts):
        written, base = _noise(plain_model, contrasts, number), _run(plain_model, contrast, "base")
        for site in SITES:
            flat = [values[site].reshape(3, -1) for values in sources]
            mean, square = (np.mean([of.mean(1) for of in those], axis=0) for those in (flat, [one**2 for one in flat]))
            spread = np.full(3, embedding.std()) if site == "residual_out" else np.sqrt(square - mean**2)
            noise = (written[site] - base[site]) / (0.5 * spread).reshape(3, *(1,) * (base[site].ndim - 1))
            ratios[site].append(noise.ravel())
    for site, several in ratios.items():
        drawn = np.concatenate(several)
        assert abs(drawn.mean()) < 4 / len(drawn) ** 0.5, site
        assert drawn.std() == pytest.approx(1, abs=4 / (2 * len(drawn)) ** 0.5), site
        assert len(np.unique(drawn.round(5))) > 0.95 * len(drawn), "numbers are drawn once each"


def test_noise_depends_on_seed_pair_layer_token_and_unit_alone(plain_model: Model, tmp_path: Path) -> None:
    """Not on other pairs' order, on other units, on positions that are swept beside, or on a stop."""
    asked: dict[str, Any] = {"unit": ("neuron", "mlp_out"), "patch": "noise"}
    table = jm.sweep(plain_model, tiny.PAIRS, out=tmp_path / "run", seed=1, **asked)
    turned = jm.sweep(plain_model, tiny.PAIRS[::-1], seed=1, **{**asked, "unit": ("neuron",), "layers": [2]})
    assert np.abs(turned.neuron.values[::-1, 2] - table.neuron.values[:, 2]).max() <= tolerances.EFFECTS
    each = jm.sweep(plain_model, tiny.PAIRS[:1], seed=1, position="each", unit="residual_out", patch="noise")
    last = jm.sweep(plain_model, tiny.PAIRS[:1], seed=1, unit="residual_out", patch="noise")
    assert np.abs(each.residual_out.values[..., -1] - last.residual_out.values).max() <= tolerances.EFFECTS
    other = jm.sweep(plain_model, tiny.PAIRS, seed=2, **asked)
    assert np.abs(other.neuron.values - table.neuron.values).max() > 10 * tolerances.EFFECTS


def test_a_resumed_run_draws_the_same_noise(plain_model: Model, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"unit": ("neuron",), "patch": "noise"}
    whole = jm.sweep(plain_model, tiny.PAIRS, **asked)

    class Stop(Exception):
        pass

    def stop(work: float, count: int, what: str) -> None:
        del work, count, what
        raise Stop

    with pytest.raises(Stop):
        jm.sweep(plain_model, tiny.PAIRS, out=tmp_path / "run", watch=stop, **asked)
    again = jm.sweep(plain_model, tiny.PAIRS, out=tmp_path / "run", resume=True, **asked)
    assert np.array_equal(again.neuron.values, whole.neuron.values)
    request = read_run(tmp_path / "run")["manifest"]["request"]
    assert (request["patch"], request["patch_factor"], request["seed"]) == ("noise", 3.0, 0)
    assert ("Patch", f"noise: {again.attrs['patch_told']}") in facts(read(tmp_path / "run"))
    with pytest.raises(UserError, match=r"patch_factor: 3\.0 there, 1\.0 now"):
        jm.sweep(plain_model, tiny.PAIRS, out=tmp_path / "run", resume=True, patch_factor=1.0, **asked)


def test_steering_one_pair_at_one_token_by_its_own_difference_is_resampling(plain_model: Model) -> None:
    units, pair = [("neuron", 1, 4), ("mlp_out", 2)], tiny.PAIRS[0]
    steered = jm.patch(plain_model, pair, units, patch="steer")
    assert steered.effect == pytest.approx(jm.patch(plain_model, pair, units).effect, abs=tolerances.EFFECTS)
    table = jm.sweep(plain_model, tiny.PAIRS, patch="steer", patch_factor=2, sets={"both": units})
    found = jm.patch(plain_model, pair, units, patch="steer", patch_factor=2, reference=tiny.PAIRS)
    assert found.effect == pytest.approx(float(table.joint[0, 0]), abs=tolerances.EFFECTS)


@pytest.mark.filterwarnings("ignore::jaxmed.errors.Notice")
@pytest.mark.parametrize("patch", [pytest.param(one, marks=() if one == "steer" else pytest.mark.slow) for one in CHANGED])
def test_patches_go_with_contrasts_directions_ways_paths_and_each_position(plain_model: Model, patch: str) -> None:
    """Reverse writes into the source run what forward writes into the base run of the turned pair."""
    pair = tiny.PAIRS[0]
    turned = jm.PromptPair("equal", pair.source, pair.base, pair.target, pair.foil)
    asked: dict[str, Any] = {"unit": ("mlp_out", "head_out"), "patch": patch}
    ways = {"estimand": ("indirect", "to_logits", "via_later", "both_ways"), "direction": "reverse"}
    reverse, forward = jm.sweep(plain_model, [pair], **ways, **asked), jm.sweep(plain_model, [turned], **asked)
    assert np.abs(reverse.mlp_out.values - forward.mlp_out.values).max() <= tolerances.EFFECTS
    summed = reverse.mlp_out_to_logits + reverse.mlp_out_via_later + reverse.mlp_out_both_ways
    assert np.abs(summed.values - reverse.mlp_out.values).max() <= tolerances.EFFECTS
    path = {"p": (("neuron", 0, 3), [("mlp_out", 2)])}
    table = jm.sweep(plain_model, tiny.PAIRS[:2], unit="mlp_out", position="each", patch=patch, paths=path)
    assert np.abs(table.path.values[..., -1]).min() > 0
    assert np.abs(table.mlp_out.values[..., -1]).max() > 10 * tolerances.EFFECTS
    model = jm.sweep(plain_model, [pair], contrast="model", source_model=tiny.model("llama"), **asked)
    assert np.isfinite(model.mlp_out.values).all()


def test_the_plan_counts_the_runs_that_means_are_taken_over(plain_model: Model) -> None:
    flops = {patch: plan(make_job(plain_model, tiny.PAIRS, Request(patch=patch))).cost.flops for patch in PATCHES}
    assert flops["scale"] == flops["zero"] == flops["resample"]
    assert flops["steer"] - flops["resample"] == 2 * (flops["mean"] - flops["resample"]) > 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"patch": "zeros-all"}, "resample, zero, mean"),
    "turned": ({"patch": "zero", "estimand": "direct"}, "--patch resample alone"),
    "no number": ({"patch": "mean", "patch_factor": 2.0}, r"--patch-factor 2 does not go with --patch mean.*: noise, scale, steer"),
    "not finite": ({"patch": "scale", "patch_factor": float("nan")}, "nan is out of range"),
    "beyond float32": ({"patch": "steer", "patch_factor": 1e39}, "out of range"),
    "a seed below zero": ({"patch": "noise", "seed": -5}, "The seed -5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_patches_that_do_not_exist_or_do_not_fit_are_refused(plain_model: Model, name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        jm.sweep(plain_model, tiny.PAIRS[:1], **settings)


@pytest.mark.parametrize("patch", ["mean", "steer"])
def test_means_over_one_pair_are_told_of(plain_model: Model, patch: str) -> None:
    with pytest.warns(Notice, match="there is one pair: they are that pair's own values"):
        jm.sweep(plain_model, tiny.PAIRS[:1], unit="mlp_out", patch=patch)


def test_a_source_model_with_the_same_weights_is_told_of(plain_model: Model) -> None:
    with pytest.warns(Notice, match="has the weights of tiny llama"):
        found = jm.sweep(plain_model, tiny.PAIRS[:1], unit="mlp_out", contrast="model", source_model=tiny.model("llama"))
    assert np.abs(found.mlp_out.values).max() <= tolerances.EFFECTS


@pytest.mark.filterwarnings("ignore::jaxmed.errors.Notice")
def test_a_direction_of_no_length_is_not_removed(plain_model: Model) -> None:
    """Base and source are one prompt: their difference is zero, and nothing is divided by it."""
    same = jm.PromptPair("same", "do a", "do a", ("S",), ("N",))
    table = jm.sweep(plain_model, [same], unit=("mlp_out", "neuron"), patch="ablate-direction")
    assert np.abs(table.mlp_out.values).max() <= tolerances.EFFECTS


def test_contrasts_of_all_pairs_weigh_the_same(plain_model: Model) -> None:
    """A pair of many tokens counts as much as one of few."""
    contrasts = make_contrasts(plain_model, tiny.PAIRS, Reading("pair", "each", "chat", ("log-odds",)))
    reference = make_reference(("source", "base"), contrasts, ("mlp_out",))
    assert reference is not None
    for side, found in reference.means.items():
        means = []
        for contrast in contrasts:
            values = jm.forward(plain_model, getattr(contrast, side).ids, taps=("mlp_out",))[1]["mlp_out"]
            means.append(np.asarray(values)[:, 0, -len(contrast.patches) :].mean(1))
        assert len({len(contrast.patches) for contrast in contrasts}) > 1
        assert np.abs(np.asarray(found["mlp_out"]) - np.mean(means, axis=0)).max() <= tolerances.RESIDUAL
