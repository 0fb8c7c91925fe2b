"""Named places in a decoder block where an activation can be read or edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxmed.errors import UserError, unknown


@dataclass(frozen=True)
class Site:
    """One named activation of a block.

    Attributes:
        name: the site's name, as in docs/concepts.md.
        axes: its letters, for one layer. The letter at `unit` is the unit axis that `Where.unit` indexes.
        unit: the letter of the unit axis.
        branch: which input projection of the MLP it is; 0 elsewhere, for every MLP has one.
    """

    name: str
    axes: str
    unit: str
    branch: int = 0


_SITES = (
    Site("residual_in", "BTD", "D"),
    Site("query", "BTNH", "N"),  # after its norm, before RoPE
    Site("key", "BTKH", "K"),  # after its norm, before RoPE
    Site("value", "BTKH", "K"),
    Site("attention_pattern", "BNTS", "N"),
    Site("head_out", "BTNH", "N"),  # per head, before the output projection
    Site("attention_out", "BTD", "D"),  # what is added to the residual stream
    Site("residual_mid", "BTD", "D"),
    Site("gate", "BTF", "F"),  # before the activation
    Site("up", "BTF", "F", branch=1),  # what the activated gate is multiplied by
    Site("neuron", "BTF", "F"),  # the input of the down projection
    Site("mlp_out", "BTD", "D"),  # what is added to the residual stream
    Site("residual_out", "BTD", "D"),
)
SITES: dict[str, Site] = {site.name: site for site in _SITES}
STREAM = ("residual_in", "residual_mid", "residual_out")
"""Sites of the residual stream itself."""
BRANCHES = ("gate", "up")
"""The input projections of the MLP, in the order of the letter C."""

INTERNAL: dict[str, Site] = {
    site.name: site
    for site in (
        Site("attention_raw", "BTD", "D"),  # the output projection, before a post-norm
        Site("mlp_raw", "BTD", "D"),  # the down projection, before a post-norm
        Site("router_logits", "BTX", "X"),  # score of every expert of a mixture, before its softmax
        Site("routing", "BTX", "X"),  # weight of every expert of a mixture
        Site("cached_key", "BTKH", "K"),  # after RoPE: what later tokens attend to
        Site("cached_value", "BTKH", "K"),
    )
}
"""Sites the engine records to restart a run; they can be tapped, not edited."""

ALIASES: dict[str, str] = {
    "hook_resid_pre": "residual_in",
    "attn.hook_q": "query",
    "hook_q": "query",
    "attn.hook_k": "key",
    "hook_k": "key",
    "attn.hook_v": "value",
    "hook_v": "value",
    "attn.hook_pattern": "attention_pattern",
    "hook_pattern": "attention_pattern",
    "attn.hook_z": "head_out",
    "hook_z": "head_out",
    "hook_attn_out": "attention_out",
    "hook_resid_mid": "residual_mid",
    "mlp.hook_pre": "gate",
    "hook_pre": "gate",
    "mlp.hook_pre_linear": "up",
    "hook_pre_linear": "up",
    "mlp.hook_post": "neuron",
    "hook_post": "neuron",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "residual_out",
}
"""TransformerLens names for the same tensors."""


def site_name(name: str) -> str:
    """The canonical name of a site, from its name or its TransformerLens alias.

    Raises:
        UserError: no such site; the message has the nearest names.
    """
    if name in SITES:
        return name
    if name in ALIASES:
        return ALIASES[name]
    raise unknown("site", name, [*SITES, *ALIASES])


def has_site(sizes: Mapping[str, int], name: str) -> bool:
    """Whether a model has a site; `sizes` are those of its letters."""
    return SITES[name].branch < sizes["C"] if name in SITES else True


def check_sites(sizes: Mapping[str, int], names: Iterable[str]) -> None:
    """Raises a UserError where a model lacks one of the sites."""
    for name in names:
        if not has_site(sizes, name):
            raise UserError(f"This model has no {name!r}: its MLP has one branch, without a gate. What goes into its activation is 'gate'.")
