"""The rooms: imports go only upward, Flax stays in models, torch stays out, names are the field's."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxmed as jm

PACKAGE = Path(jm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "axes": {"errors"},
    "memory": set(),
    "distributed": {"errors"},
    "hosts": {"errors", "distributed"},
    "statistics": set(),
    "prompts": {"errors", "files"},
    "tokens": {"errors", "files", "memory", "prompts"},
    "interventions": {"errors", "axes"},
    "models": {"errors", "files", "axes", "distributed", "interventions"},
    "attention": {"models"},
    "runner": {"errors", "axes", "tokens", "attention", "interventions", "models"},
    "generation": {"errors", "axes", "files", "prompts", "tokens", "interventions", "models", "runner"},
    "runs": {"errors", "axes", "files", "hosts", "memory", "models"},
    "results": {"errors", "files", "hosts", "runs"},
    "cache": {"errors", "files", "hosts", "tokens", "interventions", "models", "runner", "runs", "results"},
    "parity": {"errors", "hosts", "prompts", "tokens", "interventions", "models", "runner"},
    "effects": {
        "errors",
        "axes",
        "hosts",
        "cache",
        "files",
        "prompts",
        "tokens",
        "interventions",
        "models",
        "runner",
        "results",
        "statistics",
        "runs",
    },
    "batching": {"errors", "axes", "prompts", "tokens", "interventions", "models", "runner", "runs"},
    "evaluation": {"errors", "files", "prompts", "tokens", "interventions", "models", "runner", "generation", "batching", "statistics"},
    "gating": {
        "errors",
        "axes",
        "files",
        "prompts",
        "tokens",
        "interventions",
        "models",
        "generation",
        "runs",
        "results",
        "statistics",
        "effects",
    }
    | {"evaluation"},
    "circuits": {"errors", "files", "axes", "statistics", "prompts", "tokens", "interventions", "models", "attention", "runner", "runs"}
    | {"effects"},
    "probing": {"errors", "files", "prompts", "tokens", "models", "runner", "runs", "batching", "statistics", "cache"},
    "answering": {"errors", "files", "prompts", "tokens", "interventions", "models", "generation", "runs", "statistics", "effects"}
    | {"cache", "evaluation", "gating"},
    "finetuning": {"errors", "files", "axes", "prompts", "tokens", "models", "runner", "results", "runs", "batching"},
    "ground_truth": {"errors", "distributed", "prompts", "tokens", "models", "runner", "finetuning"},
    "pruning": {"errors", "axes", "files", "memory", "prompts", "tokens", "models", "runner", "results", "runs", "batching"},
    "experiments": {
        "errors",
        "files",
        "finetuning",
        "memory",
        "prompts",
        "tokens",
        "models",
        "results",
        "runs",
        "batching",
        "evaluation",
        "pruning",
        "statistics",
    },
    "bridge": {"errors", "files", "prompts", "models", "generation", "runs", "results", "statistics", "effects", "evaluation", "gating"}
    | {"pruning", "experiments"},
    "studies": {"errors", "files", "prompts", "tokens", "models", "results", "runs", "batching", "pruning", "experiments", "bridge"}
    | {"effects", "evaluation", "gating", "statistics", "finetuning"},
    "reports": {"errors", "files", "results", "runs", "statistics"},
    "loading": {"models", "finetuning", "parity"},
    "bench": {
        "errors",
        "axes",
        "files",
        "prompts",
        "tokens",
        "interventions",
        "models",
        "runner",
        "generation",
        "effects",
        "runs",
        "distributed",
    }
    | {"cache", "finetuning", "pruning"},
    "cli": {
        "errors",
        "axes",
        "files",
        "memory",
        "prompts",
        "tokens",
        "interventions",
        "models",
        "distributed",
        "hosts",
        "effects",
        "gating",
        "reports",
        "results",
        "runs",
    }
    | {"bench", "parity", "generation", "cache"}
    | {"answering", "circuits", "probing", "finetuning", "evaluation", "pruning", "experiments", "bridge", "studies"},
}
"""Room -> the rooms it may import; a room stands below every room that may import it."""


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.name != "__init__.py" or f.parent != PACKAGE], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_only_upward(path: Path) -> None:
    rooms = {name.split(".")[1] for name in _imports(path) if name.startswith("jaxmed.")}
    assert rooms - {_room(path)} <= ALLOWED[_room(path)]


def test_the_table_of_rooms_has_no_circles_and_is_in_order() -> None:
    graphlib.TopologicalSorter(ALLOWED).prepare()
    order = list(ALLOWED)
    for room, below in ALLOWED.items():
        assert not {other for other in below if order.index(other) > order.index(room)}, room


def test_files_import_each_other_in_no_circle() -> None:
    """Imports inside functions and for types alone count too; a CycleError names the files."""
    modules = {".".join(("jaxmed", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path for path in FILES}
    graph = {name: _imports(path) & modules.keys() - {name} for name, path in modules.items()}
    assert sum(map(len, graph.values())) > 2 * len(graph)
    graphlib.TopologicalSorter(graph).prepare()


def test_every_room_is_in_the_table() -> None:
    assert {_room(path) for path in FILES if path.parent != PACKAGE or path.name != "__init__.py"} == set(ALLOWED)


def test_flax_is_used_in_models_alone() -> None:
    users = {_room(path) for path in FILES if "nnx." in path.read_text()}
    assert users == {"models"}


def test_torch_is_imported_by_processes_of_their_own_alone() -> None:
    users = {path.name for path in FILES if {name.split(".")[0] for name in _imports(path)} & {"torch"}}
    assert users == {"torch_peers.py", "torch_reference.py", "torch_writer.py"}


WITHOUT_TORCH = """
import importlib.util, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name, name=name)
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "torch" else find(name, package)
sys.meta_path.insert(0, NoTorch())
import jaxmed as jm
print(jm.forward(jm.load("smollm2-135m-instruct"), [[1, 2]])[0].shape)
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_the_package_works_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert "(1, 2, 49152)" in done.stdout, done.stderr


def test_no_model_name_branches_outside_models() -> None:
    names = re.compile(r"[\"'](llama|gpt2|gemma\d?|qwen\d?|mistral|olmo\d?|phi\d?)[\"']")
    assert not [path.name for path in FILES if _room(path) not in ("models", "bench", "ground_truth") and names.search(path.read_text())]


def test_einsum_strings_use_the_legend() -> None:
    legend = set("BTSDNKHVFLUPGJCERIOY")
    for path in FILES:
        for letters in re.findall(r"(?:einsum|contract)\(\s*\"([A-Za-z.,>-]+)\"", path.read_text()):
            if letters.isupper():
                assert set(letters) - set(",->") <= legend, (path.name, letters)


def test_public_names_have_docstrings() -> None:
    for name in jm.__all__:
        assert getattr(jm, name).__doc__, name


NO_WORK = """
import ctypes, sys
class Watched(ctypes.CDLL):
    def __init__(self, name, *rest, **more):
        assert name is not None, "import changes the process"
        super().__init__(name, *rest, **more)
ctypes.CDLL = Watched
import jax, jaxmed as jm
jm.load, jm.sweep, jm.forward, jm.edits
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""


def test_import_starts_no_backend_and_leaves_the_process_alone() -> None:
    done = subprocess.run([sys.executable, "-c", NO_WORK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_those_of_the_stub() -> None:
    for name in jm.__all__:
        assert getattr(jm, name) is not None
    assert set(jm.__all__) <= set(dir(jm))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        getattr(jm, "nothing_like_it")  # noqa: B009
