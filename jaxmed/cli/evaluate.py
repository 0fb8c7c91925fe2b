"""The command `evaluate`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jaxmed.cli import show
from jaxmed.cli.edits import EditFlags, files_of
from jaxmed.cli.flags import FormFlag, LimitFlag, LogFlag, ModelFlags, PlanFlags, ResumeFlag, SourceFlags, SplitFlag, check_absent
from jaxmed.cli.judge import JudgeFlags
from jaxmed.errors import UserError
from jaxmed.experiments.specs import TextSpec
from jaxmed.files import file_digest
from jaxmed.runs.folder import open_file


@dataclass(frozen=True, kw_only=True)
class Evaluate(JudgeFlags, ModelFlags, LimitFlag, SplitFlag, FormFlag, EditFlags, TextSpec, LogFlag, ResumeFlag, PlanFlags):
    """What a model does with requests (how often it refuses, or how a judge scores its answers), and its perplexity on neutral text."""

    against: str = ""
    """A model to compare the perplexity with, such as the one that was fine-tuned."""
    examples: str = "alignment"
    """Examples file (.jsonl, .csv, .parquet; column prompt, optional kind, category, split), or a bundled set: alignment. Empty: none."""
    by: Literal["kind", "category"] = "kind"
    """Column whose values get a rate each."""
    tokens: int = 32
    """Tokens of an answer at most; answers are greedy."""
    given: bool = False
    """Judge the file's own responses instead of the model's answers."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, such as arc_easy (needs jaxmed[harness]; their data comes from the hub), or of --task-folder."""
    task_folder: Path | None = None
    """Folder of your own task files for the harness."""
    fewshot: int | None = None
    """Examples before every question of --tasks; default: as the task says."""
    save_text: bool = False
    """Keep the answers in --out; otherwise only their hashes are kept."""
    out: Path | None = None
    """JSON file for every number."""

    def run(self) -> None:
        """Answers, judges, measures, prints."""
        from jaxmed.prompts.examples import chosen
        from jaxmed.prompts.readers import read_text

        if self.out is not None and not self.resume:
            check_absent(self.out)
        if self.edits is not None and (self.tasks or self.given):
            raise UserError("--edits act on answers and perplexity alone: tasks and given responses would be those of the unedited model.")
        rows = chosen(self.examples, self.split, self.limit, responses=self.given) if self.examples else []
        whose = f"responses of {self.examples}" if self.given else f"answers of up to {self.tokens} tokens from {self.model}"
        plan = [f"{len(rows)} {whose}", *self.judge_lines()] if rows else []
        plan += [f"perplexity on {self.text}{f', against {self.against}' * bool(self.against)}"] * bool(self.text)
        plan += [f"tasks of lm-evaluation-harness: {', '.join(self.tasks)}"] * bool(self.tasks)
        if not plan:
            raise UserError("There is nothing to evaluate: give --examples, --text or --tasks.")
        if rows:
            self.check_judge(self.out)
        if self.against and not self.text:
            raise UserError("--against is compared by its perplexity: give --text, or leave it out.")
        if self.text:
            read_text(self.text)
        if self.tasks:
            self._harness().check_tasks(self.tasks, self.task_folder)
        asked = bool(self.text or self.tasks or not self.given)
        if asked:
            self._check_model(rows)
        show.lines("evaluate", plan)
        if self.dry_run:
            return
        judge = self.make_judge(self.out, self.save_text, self.mesh) if rows else None
        model: Any = self.load() if asked else None
        found = {} if model is None else {"model": self.model, "weights": model.identity, "history": list(model.history)}
        parts = {
            "judged": lambda: self._judged(model, rows, judge),
            "perplexity": lambda: self._perplexity(model),
            "tasks": lambda: self._tasks(model),
        }
        if self.out is None:
            self._show(found | {key: value for part in parts.values() for key, value in part().items()})
            return
        with (
            open_file(self.out, self._manifest(rows) | {"model": found, "loaded": self.asked()}, self.resume) as file,
            file.session() as session,
        ):
            file.record |= found
            for name, part in parts.items():
                if name not in file.record.get("parts", []):
                    file.note(**part(), parts=[*file.record.get("parts", []), name])
                session.count()
        self._show(file.record)

    def _manifest(self, rows: Sequence[Any]) -> dict[str, Any]:
        """What makes two evaluations the same: every flag that decides a number, and what the files hold."""
        from jaxmed.prompts.examples import digest
        from jaxmed.prompts.readers import read_text

        apart = ("out", "resume", "log_json", "dry_run", "config", *(one.name for one in fields(ModelFlags)))
        asked = {one.name: str(getattr(self, one.name)) for one in fields(self) if one.name not in apart}
        files = "".join(file_digest(file) for file in files_of(self.edits)) if self.edits else ""
        files += self.record().get("rubric_sha256", "")
        return asked | {"contents": digest(rows, read_text(self.text) if self.text else "", files)}

    def _check_model(self, rows: Sequence[Any]) -> None:
        """Raises a UserError for what the model, or the one that it is compared with, cannot be asked; loads no weights."""
        model = self.describe()
        if rows and not self.given:
            self._edits(model, rows)
        if self.text:
            self.everywhere(model)
        if self.text and self.against:
            self._other().describe()

    def _edits(self, model: Any, rows: Sequence[Any]) -> dict[str, Any]:
        """How the rows are answered; raises a UserError for prompts and edits that cannot be used."""
        return self.how(model, rows, self.form, self.tokens)

    def _other(self) -> SourceFlags:
        """The model that the perplexity is compared with."""
        return SourceFlags(model=self.against, dtype=self.dtype, mesh=self.mesh)

    def _judged(self, model: Any, rows: Sequence[Any], judge: Any) -> dict[str, Any]:
        """Rates or mean scores of the answers, and every answer's score."""
        from jaxmed.evaluation.answers import answer
        from jaxmed.evaluation.rates import mean_scores, rates_of

        if not rows:
            return {}
        texts = [row.response for row in rows]
        if not self.given:
            with show.progress("answers", len(rows), "answers") as report:
                texts = answer(
                    model, rows, self.tokens, self.form, **self._edits(model, rows), report=lambda count: report(count, count, "")
                )
        with show.progress("judging", len(rows), "answers") as report:
            scores = judge(rows, texts, lambda count: report(count, count, ""))
        found: dict[str, Any] = {"judge": self.judge_lines()}
        if self.judge == "rules":
            found["refusal_rates"] = [{**asdict(rate), "rate": rate.rate} for rate in rates_of(rows, scores, self.by)]
        else:
            found["scores"] = [plain(asdict(mean)) for mean in mean_scores(rows, scores, self.by)]
        kept = texts if self.save_text else [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        columns = zip(rows, kept, scores, strict=True)
        return found | {"answers": [{"prompt": row.prompt, "answer": text, "score": score} for row, text, score in columns]}

    def _tasks(self, model: Any) -> dict[str, Any]:
        """The harness's numbers."""
        if not self.tasks:
            return {}
        return {"tasks": self._harness().run_tasks(model, self.tasks, self.task_folder, self.fewshot, self.limit, self.form == "chat")}

    def _harness(self) -> Any:
        try:
            from jaxmed.evaluation import harness
        except ModuleNotFoundError:
            raise UserError("--tasks needs lm-evaluation-harness: pip install 'jaxmed[harness]'.") from None
        return harness

    def _perplexity(self, model: Any) -> dict[str, Any]:
        from jaxmed.evaluation.perplexity import perplexity, perplexity_ratio

        if not self.text:
            return {}
        here = perplexity(model, self.text, self.everywhere(model))
        found: dict[str, Any] = {"value": here.value, "tokens": here.tokens}
        if self.against:
            other = perplexity(self._other().load(), self.text)
            ratio, low, high = perplexity_ratio(other, here)
            found |= plain({"ratio": ratio, "low": low, "high": high, "against": other.value})
        return {"perplexity": found}

    def _show(self, found: dict[str, Any]) -> None:
        lines = [
            f"{of['name']}: refuses {of['refused']} of {of['answers']}, {of['rate']:.1%} (95 %: {of['low']:.1%} to {of['high']:.1%})"
            for of in found.get("refusal_rates", [])
        ]
        for of in found.get("scores", []):
            value = "no scores" if of["value"] is None else f"mean score {of['value']:.3f}"
            interval = f" (95 %: {of['low']:.3f} to {of['high']:.3f})" if of["low"] is not None else ""
            lines.append(
                f"{of['name']}: {value}{interval} of {of['answers']} answers" + f"; {of['unjudged']} not judged" * bool(of["unjudged"])
            )
        if "perplexity" in found:
            of = found["perplexity"]
            ratio = f", {of['ratio']:.3f} x that of {self.against}" if "ratio" in of else ""
            ratio += f" ({of['low']:.3f} to {of['high']:.3f})" if of.get("low") is not None else ""
            lines.append(f"perplexity on {self.text}: {of['value']:.2f} over {of['tokens']:,} tokens{ratio}")
        for task, numbers in found.get("tasks", {}).items():
            kept = {name.removesuffix(",none"): value for name, value in numbers.items() if isinstance(value, float)}
            lines.append(f"{task}: " + ", ".join(f"{name} {value:.4g}" for name, value in kept.items()))
        whose = "given responses" if self.given else self.model
        show.lines(f"{whose}, {self.split or 'all'} prompts of {self.examples}" if self.examples else whose, lines)


def plain(numbers: dict[str, Any]) -> dict[str, Any]:
    """A record for JSON, which has no NaN."""
    return {key: None if value != value else value for key, value in numbers.items()}
