"""Flags that say which two runs are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from jaxmed.cli.flags import FormFlag, LimitFlag, ModelFlags
from jaxmed.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PairsFlag:
    """What is compared."""

    pairs: str = "harm"
    """Pairs file (.jsonl, .json, .csv, .tsv, .parquet), or a bundled set: harm, control, facts."""


@dataclass(frozen=True, kw_only=True)
class OneOutcomeFlag:
    """What is read, where it is one."""

    outcome: str = "log-odds"
    """One of: logit-diff, log-odds, logprob, prefix-gap, sequence-logprob, kl (units: nats, logit-diff: logits)."""


@dataclass(frozen=True, kw_only=True)
class PromptsFlags(ModelFlags, LimitFlag, FormFlag):
    """Which two prompts of one model are compared."""

    contrast: Literal["pair", "prefill"] | None = None
    """How a pair becomes two runs: pair (the default), as it stands; prefill, base's request with the pair's two openings of the answer."""
    prefill: str = ""
    """Opening of the assistant's turn in pairs that have none of their own, such as a model's empty thought."""

    def source(self) -> Self | None:
        """The flags of the source model, or None where values come from the same one."""
        return None

    def pairs_of(self, source: str) -> Sequence[Any]:
        """The pairs of a file or bundled set, as many as the limit leaves."""
        from jaxmed.prompts import read_pairs

        return [self.opened(pair) for pair in self.first(self.among(source, read_pairs(source)))]

    def among(self, source: str, pairs: Sequence[Any]) -> Sequence[Any]:
        """Of the pairs of a file or bundled set, those that are asked for."""
        return pairs

    def opened(self, pair: Any) -> Any:
        """A pair with the opening that is given for those without one."""
        return replace(pair, base_prefill=pair.base_prefill or self.prefill, source_prefill=pair.source_prefill or self.prefill)

    def checked(self, source: str, make: Callable[[Any, Sequence[Any], Any], T]) -> tuple[Sequence[Any], T]:
        """The pairs of a file or bundled set, and the job that `make(model, pairs, source model)` makes of them; loads no weights.

        Raises:
            UserError: rows that are no pairs, together with what is wrong with the others.
        """
        from jaxmed.prompts.rows import RefusedRows

        refused = None
        try:
            pairs = self.pairs_of(source)
        except RefusedRows as error:
            pairs, refused = [self.opened(pair) for pair in error.others], error
            if not pairs:
                raise
        try:
            other = self.source()
            made = make(self.describe(), pairs, None if other is None else other.describe())
        except UserError as error:
            raise error if refused is None else UserError(f"{refused}\nOf the other rows: {error}") from None
        if refused is not None:
            raise refused
        return pairs, made


@dataclass(frozen=True, kw_only=True)
class ContrastFlags(PromptsFlags):
    """Which two runs are compared, of one model or two: the flags of every command that patches units."""

    contrast: Literal["pair", "prefill", "model"] | None = None
    """How a pair becomes two runs: pair, as it stands; prefill, base's request with the pair's two openings of the answer; model, base's
    prompt in two models. Default: pair, or model where a source model is given."""
    source_model: str | None = None
    """Model that values come from, on the same tokens: a more (or less) aligned sibling of --model, of the same sizes and vocabulary."""
    source_revision: str | None = None
    """Branch, tag or commit of the source model, such as a training stage."""
    source_adapter: Path | None = None
    """LoRA adapter of the source model, as the folder that PEFT saves. Alone: the source model is --model with it."""
    source_mask: Path | None = None
    """Mask file of `jaxmed prune` for the source model. Alone: the source model is --model with these weights set to zero."""

    def source(self) -> Self | None:
        """The flags of the source model, or None where values come from the same one."""
        given = self.source_model, self.source_revision, self.source_adapter, self.source_mask
        if not any(given):
            return None
        name = self.source_model or self.model
        return replace(self, model=name, revision=self.source_revision, adapter=self.source_adapter, mask=self.source_mask)
