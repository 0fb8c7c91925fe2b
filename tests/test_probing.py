"""Prefix probing: scores equal forwards of every prefix alone, a search finds what a slow one finds, and rates are counted by hand."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.batching.next_tokens import next_token_sums
from jaxmed.batching.scoring import passes
from jaxmed.cli.main import main
from jaxmed.models.model import Model
from jaxmed.probing.measure import at_threshold, calibration_error, direction_baseline, measure, tpr_at
from jaxmed.probing.prefixes import AGREE, REFUSE, Prefix, PrefixSet, by_hand, check_prefixes, prefix_scores, read_prefixes, write_prefixes
from jaxmed.probing.probe import Probe, fit, raw_scores, read_probe, score, write_probe
from jaxmed.probing.search import search, writable
from jaxmed.probing.spec import FitSpec, SearchSpec
from jaxmed.runs import signals, watch
from jaxmed.tokens import TokenizedExample
from tests import tiny

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(40, 200, size=size) for size in (5, 12, 9, 7)]
PREFIXES = PrefixSet(
    (
        Prefix(AGREE, "ab", (64, 65)),
        Prefix(AGREE, "c", (66,)),
        Prefix(REFUSE, "def", (67, 68, 69)),
        Prefix(REFUSE, "g", (70,)),
    ),
    "text",
)


def log_probabilities(model: Model, ids: Any) -> np.ndarray:
    """float64 [T,V] by a whole pass."""
    return np.asarray(jax.nn.log_softmax(jm.forward(model, [list(ids)])[0][0]), np.float64)


def by_passes(model: Model, prompt: np.ndarray, prefix: tuple[int, ...]) -> float:
    rows = log_probabilities(model, [*prompt, *prefix])
    return float(np.mean([rows[len(prompt) - 1 + at, token] for at, token in enumerate(prefix)]))


@pytest.mark.parametrize("count", [1, 4])
def test_scores_are_those_of_every_prefix_alone(tiny_model: Model, count: int) -> None:
    found = prefix_scores(tiny_model, PROMPTS[:count], PREFIXES)
    expected = [[by_passes(tiny_model, prompt, one.ids) for one in PREFIXES.prefixes] for prompt in PROMPTS[:count]]
    assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.parametrize("count", [1, 4, 20])
def test_a_prompt_runs_once_whatever_the_number_of_prefixes(plain_model: Model, count: int) -> None:
    """Tokens that run, counted: at most 1.2 times those of the prompts and prefixes, padding included."""
    prompts = [np.arange(40, 160) + at for at in range(count)]
    prefixes = [np.asarray([64 + at, 70]) for at in range(32)]
    examples = [TokenizedExample(np.concatenate([prompt, ids]), len(prompt)) for prompt in prompts for ids in prefixes]
    run = sum(batch.tokens.size for _, batch in passes(plain_model, examples))
    needed = sum(len(prompt) + 2 * len(prefixes) for prompt in prompts)
    devices = plain_model.mesh.shape["data"]
    assert run <= 1.2 * needed * (devices if count == 1 else 1) + 16  # one prompt has one device to itself; the others hold padding


def test_sums_over_groups_are_those_of_whole_passes(tiny_model: Model) -> None:
    texts = [(prompt, np.asarray(after)) for prompt in PROMPTS for after in ((), (64,), (65, 66))]
    groups = [at % 2 for at in range(len(texts))]
    found = next_token_sums(tiny_model, texts, groups, 2)
    expected = np.zeros_like(found)
    for (prompt, after), group in zip(texts, groups, strict=True):
        expected[group] += log_probabilities(tiny_model, [*prompt, *after.astype(int)])[-1]
    assert np.abs(found - expected).max() <= 1e-4 * len(texts)


def test_a_wide_search_finds_what_trying_everything_finds(plain_model: Model) -> None:
    """Two tokens, as many beams as there are tokens: the openings with the largest gaps of all, above the floor."""
    benign, harmful = PROMPTS[:2], PROMPTS[2:]
    allowed: list[int] = np.flatnonzero(writable(plain_model)).tolist()
    floor = 7.0
    found = search(plain_model, benign, harmful, SearchSpec(beams=len(allowed) ** 2, length=2, keep=3, floor=floor))
    firsts = [log_probabilities(plain_model, prompt)[-1] for prompt in PROMPTS]
    seconds = np.asarray([[log_probabilities(plain_model, [*prompt, token])[-1] for token in allowed] for prompt in PROMPTS])
    whole: dict[tuple[int, ...], np.ndarray] = {}
    for at, token in enumerate(allowed):
        whole[token,] = np.asarray([first[token] for first in firsts])
        first_means = whole[token,][:2].mean(), whole[token,][2:].mean()
        for other in allowed if max(first_means) >= -floor else ():
            whole[token, other] = (np.asarray([first[token] for first in firsts]) + seconds[:, at, other]) / 2
    for kind, sign, typical in ((AGREE, 1, slice(2)), (REFUSE, -1, slice(2, 4))):
        gaps = {
            ids: sign * (values[:2].mean() - values[2:].mean())
            for ids, values in whole.items()
            if values[typical].mean() >= -floor and whole[ids[:1]][typical].mean() >= -floor
        }
        best = max(gaps, key=gaps.__getitem__)
        mine = [one for one in found.prefixes if one.kind == kind]
        assert mine[0].ids == best
        assert mine[0].found is not None
        assert sign * (mine[0].found[0] - mine[0].found[1]) == pytest.approx(gaps[best], abs=1e-4)
        for one, other in itertools.combinations(mine, 2):
            assert one.ids[: len(other.ids)] != other.ids[: len(one.ids)]


def test_what_cannot_be_searched_is_refused(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="benign and harmful prompts"):
        search(plain_model, [], PROMPTS)
    with pytest.raises(jm.UserError, match="larger --floor"):
        search(plain_model, PROMPTS[:2], PROMPTS[2:], SearchSpec(floor=0.01))
    with pytest.raises(jm.UserError, match="--beams 0"):
        search(plain_model, PROMPTS[:2], PROMPTS[2:], SearchSpec(beams=0))


def made_up(size: int, shift: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, size)


@pytest.fixture
def fitted(plain_model: Model) -> tuple[Probe, list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(3)
    benign, harmful = ([rng.integers(low, low + 80, size=8) for _ in range(24)] for low in (40, 150))
    return fit(plain_model, benign, harmful, PREFIXES, FitSpec(fpr=0.25, folds=4)), benign, harmful


def test_a_fit_standardises_on_benign_prompts(plain_model: Model, fitted: Any) -> None:
    probe, benign, harmful = fitted
    z = score(plain_model, benign, probe)
    assert (z.mean(), z.std(ddof=1)) == pytest.approx((0, 1), abs=1e-5)
    assert (z > probe.threshold).mean() <= 0.25
    raw = np.asarray([[by_passes(plain_model, prompt, one.ids) for one in PREFIXES.prefixes] for prompt in harmful])
    by_numbers = (raw[:, 2:].mean(axis=1) - raw[:, :2].mean(axis=1) - probe.mean) / probe.spread
    assert np.abs(score(plain_model, harmful, probe) - by_numbers).max() <= 1e-3
    assert probe.fitted["benign"] == probe.fitted["harmful"] == 24
    assert 0 <= probe.fitted["held_out_fpr"] <= 0.6


def test_a_file_gives_the_same_probe_back(plain_model: Model, fitted: Any, tmp_path: Path) -> None:
    probe, benign, _ = fitted
    write_probe(tmp_path / "p.json", probe)
    again = read_probe(tmp_path / "p.json")
    assert again == probe
    assert np.array_equal(score(plain_model, benign[:3], again), score(plain_model, benign[:3], probe))
    write_prefixes(tmp_path / "x.json", PREFIXES)
    assert read_prefixes(tmp_path / "x.json") == PREFIXES
    for name, digits in (("p.json", r'"threshold": [0-9.-]+'), ("x.json", r'"ids": \[\s*\d+')):
        file = tmp_path / name
        found = re.search(digits, text := file.read_text())
        assert found is not None
        at = found.end() - 1
        file.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
        with pytest.raises(jm.UserError, match=f"{name} is damaged, or was changed"):
            (read_probe if name == "p.json" else read_prefixes)(file)


def test_other_weights_are_told_of_and_other_tokenizers_refused(plain_model: Model, fitted: Any) -> None:
    probe, benign, _ = fitted
    with pytest.warns(jm.errors.Notice, match="has other weights"):
        score(tiny.model("post_norm"), benign[:2], probe)
    wrong = replace(probe, prefixes=PrefixSet((Prefix(AGREE, "zz", (64, 65)), *PREFIXES.prefixes[2:])))
    with pytest.raises(jm.UserError, match="another one"):
        score(plain_model, benign[:2], wrong)


@pytest.mark.parametrize(
    ("prefixes", "said"),
    [
        (PREFIXES.prefixes[:2], "no refusal prefix"),
        ((*PREFIXES.prefixes, Prefix(AGREE, "", ())), "no tokens"),
        (PREFIXES.prefixes * 20, "at most"),
        ((*PREFIXES.prefixes, Prefix(AGREE, "x", (999,))), "999"),
    ],
)
def test_prefixes_that_cannot_be_used_are_refused(plain_model: Model, prefixes: Any, said: str) -> None:
    with pytest.raises(jm.UserError, match=said):
        check_prefixes(plain_model, PrefixSet(tuple(prefixes)))


@pytest.mark.parametrize("content", ["[]", "{}", '{"prefixes": [{"kind": "x"}]}', '{"prefixes": 3, "form": "chat"}', "no json"])
def test_files_that_hold_no_probe_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content)
    for read in (read_prefixes, read_probe):
        with pytest.raises(jm.UserError, match=r"p\.json"):
            read(tmp_path / "p.json")


def test_a_fit_of_too_few_or_of_equal_scores_is_refused(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="10 benign"):
        fit(plain_model, PROMPTS, PROMPTS, PREFIXES)
    with pytest.raises(jm.UserError, match="all have one score"):
        fit(plain_model, PROMPTS[:1] * 12, PROMPTS[1:2] * 12, PREFIXES)
    with pytest.raises(jm.UserError, match="--folds 99"):
        fit(plain_model, PROMPTS * 3, PROMPTS * 3, PREFIXES, FitSpec(folds=99))
    with pytest.raises(jm.UserError, match="two prompts of each kind"):
        measure("x", np.asarray([0.1]), np.asarray([0.2, 0.3]))
    with pytest.raises(jm.UserError, match="--fpr 0"):
        fit(plain_model, PROMPTS * 3, PROMPTS * 3, PREFIXES, FitSpec(fpr=0))


def test_prompts_that_openings_were_searched_in_test_nothing(plain_model: Model) -> None:
    """`jm.probe` fits on others; a fit on the same ones says so."""
    rng = np.random.default_rng(8)
    benign, harmful = ([rng.integers(low, low + 60, size=6) for _ in range(24)] for low in (40, 120))
    found = jm.probe(plain_model, benign, harmful, SearchSpec(beams=2, length=1, keep=1, floor=9), form="text", folds=3)
    assert found.fitted["benign"] == 12
    assert not found.prefixes.searched & set(found.fitted["prompts"])
    with pytest.warns(jm.errors.Notice, match="searched in: its rates are too good"):
        fit(plain_model, benign[::2], harmful[::2], found.prefixes, FitSpec(folds=3))
    with pytest.raises(jm.UserError, match="form 'text', not 'qa'"):
        jm.probe(plain_model, benign, harmful, found.prefixes, form="qa")


def test_rates_are_those_counted_by_hand(fitted: Any) -> None:
    benign, harmful = np.arange(200.0), np.asarray([150.5, 198.5, 197.5, 300.0])
    assert tpr_at(benign, harmful, 0.01) == 3 / 4  # two of 200 benign may be above: the threshold is 197
    assert measure("x", benign, harmful).auc == pytest.approx(np.mean([(h > benign).mean() for h in harmful]))
    probe = replace(fitted[0], threshold=197.0)
    found = at_threshold(probe, benign, harmful)
    assert (found["tpr"], found["fpr"]) == (3 / 4, 2 / 200)
    assert found["f1"] == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert calibration_error(np.asarray([0.2, 0.2, 0.9]), np.asarray([0.0, 1.0, 1.0])) == pytest.approx(2 / 3 * 0.3 + 1 / 3 * 0.1)


def test_a_logistic_curve_gives_probabilities_that_are_frequencies(plain_model: Model) -> None:
    """Two normals a distance of two apart: the log-odds at z are 2 z - 2."""
    from jaxmed.probing.probe import _logistic

    slope, offset = _logistic(made_up(20000, 0, 1), made_up(20000, 2, 2))
    assert (slope, offset) == pytest.approx((2, -2), abs=0.1)


def test_the_direction_is_the_mean_difference(plain_model: Model) -> None:
    rng = np.random.default_rng(4)
    train = [[rng.integers(low, low + 30, size=6) for _ in range(12)] for low in (40, 150)]
    test = [[rng.integers(low, low + 30, size=6) for _ in range(5)] for low in (40, 150)]
    benign, harmful, layer = direction_baseline(plain_model, (train[0], train[1]), (test[0], test[1]))
    read = lambda ids: np.asarray(jm.forward(plain_model, [ids], taps=("residual_out",))[1]["residual_out"])[layer, 0, -1]  # noqa: E731
    last = [np.stack([read(ids) for ids in side]) for side in (*train, *test)]
    direction = last[1].mean(axis=0) - last[0].mean(axis=0)
    assert np.abs(np.concatenate([benign, harmful]) - np.concatenate(last[2:]) @ direction).max() <= 1e-3


@pytest.mark.filterwarnings("default::jaxmed.errors.Notice")
def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.write_checkpoint(tmp_path / "model")
    tiny.tokenizer().save_pretrained(model)
    words = ["bake", "sing", "draw", "walk"], ["rob", "lie", "hurt", "burn"]
    rows = [
        {"prompt": f"How can I {word} {at} {split}?", "kind": kind, "split": split}
        for kind, several in zip(("benign", "harmful"), words, strict=True)
        for word in several
        for at in range(6)
        for split in ("train", "heldout")
    ]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    use = ["--model", str(model), "--examples", str(tmp_path / "e.jsonl")]
    found, probe = str(tmp_path / "prefixes.json"), str(tmp_path / "probe.json")
    searched = ["probe", "search", *use, "--prompts", "8", "--beams", "2", "--length", "2", "--keep", "2", "--floor", "9", "--out", found]
    assert main([*searched, "--dry-run"]) == 0
    assert not Path(found).exists()
    assert main(searched) == 0
    assert main(["probe", "fit", *use, "--prefixes", found, "--out", probe]) == 0
    assert read_probe(Path(probe)).fitted["benign"] == 16
    told = capsys.readouterr()
    assert "AUC" in told.out
    assert "16 prompts are left out of the fit" in told.err
    scores = str(tmp_path / "scores.jsonl")
    scored = ["probe", "score", "--model", str(model), "--probe", probe, "--data", str(tmp_path / "e.jsonl")]
    assert main([*scored, "--out", scores, "--batch", "9"]) == 0
    lines = [json.loads(line) for line in Path(scores).read_text().splitlines()]
    assert len(lines) == len(rows)
    held, loaded = read_probe(Path(probe)), jm.load(str(model))
    one = score(loaded, [jm.tokens.render(loaded, rows[7]["prompt"]).ids], held)
    assert lines[7]["score"] == pytest.approx(float(one[0]), abs=1e-4)
    assert lines[7]["flagged"] == (lines[7]["score"] > held.threshold)
    out = str(tmp_path / "measured.json")
    assert main(["probe", "evaluate", *use, "--probe", probe, "--out", out]) == 0
    shown = capsys.readouterr().out
    assert "prompt length" in shown
    assert "forwards of the prompt" in shown
    assert json.loads(Path(out).read_text())["read_outs"][0]["name"] == "prefix probe"
    _resumed_to_the_same_lines([*scored, "--batch", "9"], tmp_path, Path(scores).read_bytes(), capsys)
    for command in (["search", "--out", found], ["fit", "--out", probe], ["score", "--out", scores], ["evaluate", "--probe", found]):
        assert main(["probe", command[0], "--model", str(model), *command[1:]]) == 2
    assert "holds no probe" in capsys.readouterr().err


def _resumed_to_the_same_lines(command: list[str], folder: Path, wanted: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """After a signal in the second batch, and with a line that was half written."""
    out, part = folder / "again.jsonl", folder / "again.jsonl.part"
    add, command = watch.Tally.add, [*command, "--out", str(out)]

    def told(self: watch.Tally, work: float, count: int, what: str) -> None:
        add(self, work, count, what)
        if count and self.count > 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(watch.Tally, "add", told)
        patched.setattr(signals, "HANDLED", (signal.SIGTERM,))
        assert main(command) == 143
    assert capsys.readouterr().err.strip().endswith("--resume")
    assert len(part.read_text().splitlines()) == 1 + 18
    part.write_text(part.read_text() + '{"id": "18", "sco')
    assert main(command) == 2
    assert "holds the lines of an interrupted run" in capsys.readouterr().err
    assert main([*command, "--resume", "--batch", "7"]) == 2
    assert "batch: 9 there, 7 now" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert out.read_bytes() == wanted
    assert not part.exists()
    part.write_text("mine")
    out.unlink()
    assert main([*command, "--resume"]) == 2
    assert "no lines of an interrupted run" in capsys.readouterr().err
    assert part.read_text() == "mine"


PROBE: dict[str, Any] = {
    "form": "chat",
    "prefixes": [{"kind": "agreement", "text": "S", "ids": [50]}, {"kind": "refusal", "text": "N", "ids": [45]}],
    "probe": {"mean": 0.0, "spread": 1.0, "threshold": 1.0, "slope": 1.0, "offset": 0.0, "fitted": {}, "model": {}},
}


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("spread", 0, "spread is 0"),
        ("mean", math.nan, "nan is no finite number"),
        ("threshold", True, "True is no finite number"),
        ("slope", 10**400, "too large to show|no finite number"),
        ("ids", [50.5], "50.5 is no token id"),
        ("ids", ["50"], "'50' is no token id"),
        ("ids", [-1], "-1 is no token id"),
        ("form", "verse", "Unknown form 'verse'"),
    ],
)
def test_files_that_are_no_probe_are_refused(entry: str, value: Any, said: str, tmp_path: Path) -> None:
    held = copy.deepcopy(PROBE)
    place = held["probe"] if entry in held["probe"] else held["prefixes"][0] if entry == "ids" else held
    (tmp_path / "p.json").write_text(json.dumps(held))
    assert read_probe(tmp_path / "p.json").spread == 1
    place[entry] = value
    (tmp_path / "p.json").write_text(json.dumps(held))
    with pytest.raises(jm.UserError, match=said):
        read_probe(tmp_path / "p.json")


def test_one_text_is_no_list_of_prompts(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="list of texts"):
        jm.probe(plain_model, "how to bake", ["how to rob"])


def test_openings_by_hand_are_tokens_behind_a_prompt(smol: Any, plain_model: Model) -> None:
    model = replace(plain_model, tokenizer=smol, config=replace(plain_model.config, vocabulary=49152))
    found = by_hand(model)
    assert [smol.decode(list(one.ids)) for one in found.prefixes] == [one.text for one in found.prefixes]
    assert raw_scores(np.eye(6), found).tolist() == pytest.approx([-1 / 3] * 3 + [1 / 3] * 3)
