"""The settings of the bridge between mediation and pruning; they are flags of the study of mediation, too. No JAX."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmed.prompts.forms import FormName


@dataclass(frozen=True, kw_only=True)
class BridgeSpec:
    """Which weights are set beside the mediating units."""

    prune: str = ""
    """Behaviour whose weights are pruned and set beside the units that mediate: a bundled set or a file of examples (rows of kind harmful,
    where a file has kinds), or a mask file (.safetensors); empty: no such part."""
    prune_controls: tuple[str, ...] = ("trivia", "pirate")
    """Control behaviours that are pruned for in the same way: sets or mask files."""
    preserve: str = "ordinary"
    """Examples whose weights are spared, and whose loss says what a mask costs."""
    prune_form: FormName = "plain"
    """How the prompts and responses of these sets are joined; see --form."""
    q: float = 1e-3
    """Fraction of each matrix's weights that are chosen for a behaviour; less leaves too few of them in one layer to say where they sit."""
    p: float = 5e-3
    """Fraction of each matrix's weights that are spared."""
    score_limit: int = 60
    """Examples of each set that are scored."""
    test_limit: int = 25
    """Held-out examples of each set that are tested."""
    mediators: int = 32
    """Mediating neurons of a layer, and mediating heads, at most; never more than an eighth of them."""
    prune_pairs: int = 40
    """Pairs whose totals and answers are measured under every mask."""
    prune_draws: int = 2
    """Groups of random neurons with weights of like size, pruned beside the mediating ones."""
