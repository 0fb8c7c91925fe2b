"""The command `prune compression`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmed.cli import show
from jaxmed.cli.flags import ConfigFlags
from jaxmed.cli.measure import begin
from jaxmed.errors import UserError
from jaxmed.experiments.specs import UtilitySpec


@dataclass(frozen=True, kw_only=True)
class Compression(ConfigFlags, UtilitySpec):
    """How many fewer weights carry a behaviour in an aligned model than in its base, from curves of both; runs no model."""

    base: tuple[Path, ...] = ()
    """Folders of `prune curve` of the base model, one per behaviour."""
    aligned: tuple[Path, ...] = ()
    """Folders of `prune curve` of the aligned model, in the order of --base; of several models, all of one, then of the next."""
    behaviours: tuple[str, ...] = ()
    """Test set of each folder that is its behaviour, in the order of --base."""
    control: str = ""
    """One of --behaviours whose compression is subtracted."""
    names: tuple[str, ...] = ()
    """Names of the models, the base first; default: those in the folders."""
    seed: int = 0
    """Seed of the resamples behind the intervals."""
    out: Path = Path("jaxmed-compression")
    """Folder for compression.csv, compression.html and run.json."""

    def run(self) -> None:
        """Reads curves, compares, draws."""
        from jaxmed.experiments.compression import COMPRESSION, compression_rows
        from jaxmed.files import write_csv
        from jaxmed.reports.curves import write_compression

        curves = self._curves()
        if self.control and self.control not in self.behaviours:
            raise UserError(f"The control {self.control!r} is none of --behaviours ({', '.join(self.behaviours)}).")
        folders = {"base": [str(one) for one in self.base], "aligned": [str(one) for one in self.aligned], "names": list(curves)}
        asked = {"behaviours": self.behaviours, "control": self.control, "utility": self.utility, "seed": self.seed}
        with begin(self.out, False, (COMPRESSION,), asked | folders):
            rows = compression_rows(curves, next(iter(curves)), self.control, 1 + self.utility, seed=self.seed)
            write_csv(self.out / COMPRESSION, rows)
        show_compression(rows, self.control)
        show.out.print(f"compression: {write_compression(self.out / COMPRESSION, self.out / 'compression.html')}", markup=False)

    def _curves(self) -> dict[str, dict[str, Any]]:
        from jaxmed.experiments.compression import read_curve
        from jaxmed.experiments.curve import CURVE, EXAMPLES
        from jaxmed.experiments.table import read_rows
        from jaxmed.runs.folder import read_run
        from jaxmed.runs.legal import check_tables

        count = len(self.behaviours)
        if not count or len(self.base) != count or not self.aligned or len(self.aligned) % count:
            raise UserError("Give --behaviours, and a folder of `prune curve` for each of them in --base and for each model in --aligned.")
        folders = [self.base, *(self.aligned[at : at + count] for at in range(0, len(self.aligned), count))]
        if self.names and len(self.names) != len(folders):
            raise UserError(f"There are {len(self.names)} names for {len(folders)} models.")
        curves: dict[str, dict[str, Any]] = {}
        for number, held in enumerate(folders):
            for folder in held:
                if not (folder / CURVE).is_file():
                    raise UserError(f"{folder} holds no curve. Give --out folders of `jaxmed prune curve`.")
                check_tables(folder, read_run(folder))
            for one, other in zip(self.base, held, strict=True):
                check_alike(one, other)
            name = self.names[number] if self.names else read_run(held[0])["manifest"]["model"]
            if name in curves:
                raise UserError(f"Two models are called {name!r}. Tell them apart with --names.")
            curves[name] = {
                behaviour: read_curve(read_rows(folder / CURVE), read_rows(folder / EXAMPLES), behaviour)
                for behaviour, folder in zip(self.behaviours, held, strict=True)
            }
        return curves


def check_alike(one: Path, other: Path) -> None:
    """Raises a UserError where two curves are not finished, or not of the same request but for the model."""
    from jaxmed.experiments.curve import CURVE
    from jaxmed.experiments.table import read_rows
    from jaxmed.runs.folder import read_run

    found = [read_run(folder)["manifest"] for folder in (one, other)]
    for folder, manifest in zip((one, other), found, strict=True):
        missing = {float(q) for q in manifest["qs"]} - {float(row["q"]) for row in read_rows(folder / CURVE)}
        if missing:
            raise UserError(f"The curve in {folder} is not finished: q {sorted(missing)[0]:g} is missing. Continue it with --resume.")
    for key in ("tests", "split", "limit", "text", "form", "qs", "rule", "contents"):
        if found[0][key] != found[1][key]:
            raise UserError(f"The curves in {one} and {other} differ in {key!r}, so their models cannot be compared.")


def show_compression(rows: Sequence[Mapping[str, Any]], control: str) -> None:
    """Prints the table of a compression."""
    title = "q50: fraction q of chosen weights at which a behaviour is halved; compression: how much smaller it is (natural logarithm)"
    columns = (
        "model",
        "behaviour",
        "q50",
        "q50, 95 %",
        "perplexity there",
        "compression",
        f"minus {control}" if control else "net",
        "net, 95 %",
    )
    lines = []
    for row in rows:
        reached = {"yes": f"{row['q50']:.2e}", "at most": f"<= {row['q50']:.2e}", "no": "not reached"}[row["reached"]]
        cost = f"x {row['perplexity_at_q50']:.3f}" + " (above the limit)" * (row["within_limit"] == 0)
        cost = cost if row["within_limit"] != "" and row["reached"] != "no" else "-"
        cells = [row["model"], row["behaviour"], reached, between(row["q50_low"], row["q50_high"], ".2e"), cost]
        net = [f"{row['compression']:+.2f}", f"{row['net']:+.2f}", between(row["net_low"], row["net_high"], "+.2f")]
        lines.append([*cells, *net])
    show.table(title, columns, lines, 2)


def between(low: float, high: float, form: str) -> str:
    """An interval, or a dash where there is none."""
    return "-" if low != low or high != high else f"{low:{form}} to {high:{form}}"
