"""What a sweep is asked for, and everything about it that can be refused without reading a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxmed.effects.budget import read_budget
from jaxmed.effects.contrast import CONTRASTS, Contrast
from jaxmed.effects.estimands import ESTIMANDS, PASSES, WHOLE, check_estimands
from jaxmed.effects.mediators import MEDIATORS, check_units
from jaxmed.effects.methods import METHODS, check_method
from jaxmed.effects.outcomes import OutcomeName, check_outcomes
from jaxmed.effects.patches import Patching, check_patch
from jaxmed.effects.sets import UnitPath, UnitSet, check_paths, check_sets, kinds_of
from jaxmed.effects.stored import check_stored
from jaxmed.errors import UserError, unknown
from jaxmed.models.config import ModelConfig
from jaxmed.models.model import Model

DIRECTIONS = ("forward", "reverse")

MOST_POINTS = 64
"""Of integrated gradients."""
BY = ("", "category")
"""What statistics may be split by."""


@dataclass(frozen=True)
class Request:
    """What a sweep computes.

    Attributes:
        outcomes: names in `OUTCOMES`, or functions of the logits after the last prompt token.
        units: keys of `MEDIATORS`.
        position: which tokens are patched (see `tokens.locate`), "each" one by itself, or "spans": each named span by itself.
        window: neurons per window of the unit "window".
        layers: layers to sweep; None is all.
        form: how prompts are written; see `prompts.forms`.
        seed: of resamples and flips, and of a patch with noise.
        top: rows per unit in top.csv; of a screened sweep, the largest units that it looks for.
        estimands: keys of `ESTIMANDS`.
        contrast: a key of `CONTRASTS`: how a pair becomes two runs.
        direction: "reverse": base and source change places.
        method: a key of `METHODS`.
        sets, paths: units that are patched together, and senders with the receivers that respond to them; with these, `units` may be empty.
        patch: a key of `PATCHES`: what is written in the place of base values.
        patch_factor: the number that the patch takes, if any; None: its default.
        reference: of the patch "mean": a folder of activations whose means are written; empty: those of the pairs' source runs.
        by: what statistics are split by too, of `BY`.
        budget: of a screened sweep; see `budget.read_budget`.
        points: of integrated gradients, where the gradient is taken on each way, 1 to MOST_POINTS.
    """

    outcomes: tuple[OutcomeName, ...] = ("log-odds",)
    units: tuple[str, ...] = ("neuron",)
    position: str | int = "last"
    window: int = 32
    layers: tuple[int, ...] | None = None
    form: str = "chat"
    seed: int = 0
    top: int = 50
    estimands: tuple[str, ...] = ("indirect",)
    contrast: str = "pair"
    direction: str = "forward"
    method: str = "exact"
    sets: tuple[UnitSet, ...] = ()
    paths: tuple[UnitPath, ...] = ()
    by: str = ""
    patch: str = "resample"
    patch_factor: float | None = None
    budget: str = "2%"
    points: int = 5
    reference: str = ""

    @property
    def patching(self) -> Patching:
        """The patch with its number, seed and reference."""
        return Patching(self.patch, self.patch_factor, self.seed, self.reference)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of all units that are patched, alone or together."""
        together = [(*one.units, *one.held) for one in self.sets] + [(one.sender, *one.receivers) for one in self.paths]
        return tuple(dict.fromkeys((*self.units, *(kind for units in together for kind in kinds_of(units)))))


def check_request(request: Request, model: Model, source_model: Model | None) -> Request:
    """The request with names in the order of their tables.

    Raises:
        UserError: bad outcome, unit, estimand, set, path, window or word; a source model that cannot be compared.
    """
    outcomes, together = check_outcomes(request.outcomes, model.config.vocabulary), bool(request.sets or request.paths)
    units = () if together and not request.units else check_units(model.config, request.units)
    request = replace(request, outcomes=outcomes, units=units, estimands=check_estimands(tuple(request.estimands)))
    if any(unit in MEDIATORS and MEDIATORS[unit].windowed for unit in request.kinds):
        _check_window(model.config, request.window)
    check_sets(model.config, request.sets, request.window)
    check_paths(model.config, request.paths, request.window)
    request = replace(request, patch_factor=check_patch(request.patching).factor)
    _check_words(request, model, source_model)
    if request.reference:
        check_stored(request.reference, request.kinds)
    read_budget(request.budget)
    if not 1 <= request.points <= MOST_POINTS:
        raise UserError(f"--points {request.points} is out of range: 1 to {MOST_POINTS}. Five are enough for most outcomes.")
    check_method(request.method, outcomes, request.estimands, together, model.config.vocabulary)
    if METHODS[request.method].both_ends and request.patch != "resample":
        raise UserError(f"--method {request.method} goes with --patch resample alone: its other gradient is that of the source run.")
    layers_of(model.config, request.layers)
    return request


def _check_siblings(model: Model, source_model: Model) -> None:
    """Two models are compared activation by activation on the same token ids."""
    for name in ("layers", "width", "heads", "kv_heads", "head_width", "neurons", "experts", "vocabulary"):
        ours, theirs = getattr(model.config, name), getattr(source_model.config, name)
        if ours != theirs:
            raise UserError(f"{source_model.name} has {name} {theirs} and {model.name} has {ours}: values cannot be copied between them.")
    tokenizers = model.tokenizer, source_model.tokenizer
    if None not in tokenizers and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise UserError(f"{source_model.name} and {model.name} have different vocabularies: the same token ids are other texts.")


def _check_words(request: Request, model: Model, source_model: Model | None) -> None:
    if request.contrast not in CONTRASTS:
        raise unknown("contrast", request.contrast, CONTRASTS)
    _check_together(request)
    other = [name for name in request.estimands if any(PASSES[need].turned for need in ESTIMANDS[name].needs - {"total"})]
    if request.patch != "resample" and other:
        raise UserError(f"The estimand {other[0]!r} patches the source run with base's values; it goes with --patch resample alone.")
    if request.direction not in DIRECTIONS:
        raise unknown("direction", request.direction, DIRECTIONS)
    if request.by not in BY:
        raise unknown("way to split statistics", request.by, BY)
    if source_model is not None:
        _check_siblings(model, source_model)
    if (request.contrast == "model") != (source_model is not None):
        raise UserError('The contrast "model" compares two models on the same tokens: give it a source model, and no other contrast one.')


def _check_together(request: Request) -> None:
    """Sets and paths have no vector of their own in the residual stream."""
    if (request.sets or request.paths) and (other := [name for name in request.estimands if name not in WHOLE]):
        raise UserError(f"Sets and paths have no estimand {other[0]!r}; they have: {', '.join(sorted(WHOLE))}. Sweep single units apart.")


def layers_of(config: ModelConfig, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    found = tuple(range(config.layers)) if layers is None else tuple(sorted(set(layers)))
    if not found or not 0 <= found[0] <= found[-1] < config.layers:
        raise UserError(f"--layers names layer {found[-1] if found else 'none'}; this model has layers 0 to {config.layers - 1}.")
    return found


def check_spans(contrasts: Sequence[Contrast]) -> None:
    """Means over pairs are taken span by span, so all pairs have the same ones."""
    labels = [[patch.label for patch in contrast.patches] for contrast in contrasts]
    for contrast, own in zip(contrasts, labels, strict=True):
        if own != labels[0]:
            first = contrasts[0].pair.id
            raise UserError(
                f"pair {contrast.pair.id!r} has the spans {own}, and pair {first!r} has {labels[0]}. Give all pairs the same columns."
            )


def _check_window(config: ModelConfig, window: int) -> None:
    """Refuses a window of more neurons than a layer has, and in a mixture one that would straddle experts."""
    if not 1 <= window <= config.neurons:
        raise UserError(f"--window {window} is out of range: 1 to {config.neurons} neurons.")
    inside = config.sizes["M"]
    if config.experts and inside % window:
        legal = ", ".join(str(size) for size in range(1, inside + 1) if inside % size == 0)
        raise UserError(f"--window {window} would straddle experts, which have {inside} neurons each. Legal: {legal}.")
