"""Writes the parts of docs/ that are made of the code: the reference of commands and of Python names, the tables of rooms and models.

python scripts/make_docs.py            # writes them
python scripts/make_docs.py --check    # exit code 1 where one of them is not current
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxmed as jm
from jaxmed.cli.main import COMMANDS, GROUPS
from jaxmed.models import catalog

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = "<!-- Made by scripts/make_docs.py; do not edit. -->"
METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", bool: ""}


def main() -> int:
    """Writes or checks every made page; the exit code."""
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current. Run: python scripts/make_docs.py", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(pages()[path], encoding="utf-8")
    return 0


def pages() -> dict[Path, str]:
    """Path -> the text it must have."""
    return {
        DOCS / "reference" / "cli.md": cli_page(),
        DOCS / "reference" / "python.md": python_page(),
        DOCS / "design.md": _filled(DOCS / "design.md", "rooms", rooms_table()),
        DOCS / "models.md": _filled(DOCS / "models.md", "catalogue", catalogue_table()),
    }


def _filled(path: Path, name: str, table: str) -> str:
    """A page with what stands between its two markers replaced."""
    begin, end = f"<!-- begin {name}: made by scripts/make_docs.py -->", f"<!-- end {name} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    if not after:
        raise SystemExit(f"{path} lacks the markers of {name!r}.")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


# The reference of commands: tyro makes flags of dataclass fields and help of the text below them, and so does this page.


def cli_page() -> str:
    """Every command with its flags."""
    lines = ["# Commands", "", MADE, ""]
    lines += ["After reading this page you know every flag of every command, its default and its unit.", ""]
    lines += [
        "`jaxmed COMMAND --help` prints the same. `--config FILE.yaml` holds any flags as `flag: value`; flags on the command line win.",
        "",
    ]
    lines += [
        "Exit codes: 0 is done; 1 means that `parity` sees a difference; 2 is wrong usage or bad input; "
        "130 and 143 follow SIGINT and SIGTERM.",
        "",
    ]
    lines += [f"- `jaxmed {group}`: {told}" for group, told in GROUPS.items()]
    for name, command in COMMANDS.items():
        lines += [
            "",
            f"## jaxmed {name}",
            "",
            " ".join((command.__doc__ or "").split()),
            "",
            "| flag | default | meaning |",
            "|---|---|---|",
        ]
        lines += [_row(*flag) for flag in flags(command)]
    return "\n".join(lines) + "\n"


def flags(command: type) -> list[tuple[str, str, str]]:
    """(flag with its values, default, meaning) of a command's dataclass: needed ones first, then its own, then inherited ones."""
    told, types, own = meanings(command), typing.get_type_hints(command, include_extras=True), inspect.get_annotations(command)
    found = []
    for one in sorted(dataclasses.fields(command), key=lambda one: one.name not in own):
        positional = "Positional" in repr(types[one.name])
        name = one.name.upper() if positional else f"--{one.name.replace('_', '-')}"
        values = "" if positional else values_of(types[one.name])
        needed = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        found.append((f"{name} {values}".strip(), "needed" if needed else _default(one.default), told.get(one.name, "")))
    return sorted(found, key=lambda row: row[1] != "needed")


def meanings(command: type) -> dict[str, str]:
    """Field -> the text below it, in the class that declares it last."""
    found: dict[str, str] = {}
    for owner in reversed(command.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def values_of(kind: Any) -> str:
    """What may stand behind a flag."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Annotated:
        return values_of(arguments[0])
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(str(value) or '""' for value in arguments)
    if typing.get_origin(kind) is tuple:
        return f"{values_of(arguments[0])} ..."
    if arguments:  # a type or None
        return values_of(next(one for one in arguments if one is not type(None)))
    return METAVARS.get(kind, "TEXT")


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _row(*cells: str) -> str:
    name, default, meaning = (cell.replace("|", "\\|") for cell in cells)
    return f"| `{name}` | {f'`{default}`' if default else ''} | {_inert(meaning)} |"


def _inert(text: str) -> str:
    """A text in which no part is taken for HTML."""
    return re.sub(r"<(?=\w)", "&lt;", text)


# The reference of Python names.


def python_page() -> str:
    """An entry for every public name; mkdocstrings fills in signatures and docstrings."""
    lines = ["# Python", "", MADE, "", "After reading this page you know every public name of `import jaxmed as jm`.", ""]
    for name in sorted(jm.__all__, key=str.lower):
        value = getattr(jm, name)
        lines += [f"## jm.{name}", "", *_entry(value), ""]
    return "\n".join(lines)


def _entry(value: Any) -> list[str]:
    """The directive of an object; of a module, its docstring and its public functions and classes."""
    if not isinstance(value, ModuleType):
        return [_directive(f"{value.__module__}.{value.__qualname__}")]
    members = [getattr(value, name) for name in getattr(value, "__all__", _own(value))]
    kept = {f"{one.__module__}.{one.__qualname__}": None for one in members if _is_entry(one)}
    return [(value.__doc__ or "").strip(), *(f"\n{_directive(path)}" for path in kept)]


def _is_entry(one: Any) -> bool:
    """Whether an object of a module is told there: a function or class that has no heading of its own."""
    return (inspect.isfunction(one) or inspect.isclass(one)) and not any(getattr(jm, name) is one for name in jm.__all__)


def _own(module: ModuleType) -> list[str]:
    return [name for name, one in vars(module).items() if not name.startswith("_") and getattr(one, "__module__", "") == module.__name__]


def _directive(path: str) -> str:
    importlib.import_module(path.rpartition(".")[0])
    return f"::: {path}"


# Tables.


def rooms_table() -> str:
    """The rooms in the order of the architecture test, with what each may import."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    node = next(one for one in tree.body if isinstance(one, ast.AnnAssign) and getattr(one.target, "id", "") == "ALLOWED")
    assert node.value is not None
    allowed = eval(compile(ast.Expression(node.value), "ALLOWED", "eval"))
    order = list(allowed)
    rows = [f"| `{room}` | {_about(room)} | {', '.join(sorted(allowed[room], key=order.index)) or '-'} |" for room in order]
    return "\n".join(["| room | what is in it | may import |", "|---|---|---|", *rows])


def _about(room: str) -> str:
    first = (importlib.import_module(f"jaxmed.{room}").__doc__ or "").strip().split("\n\n")[0]
    return _inert(" ".join(first.split())).replace("|", "\\|")


def catalogue_table() -> str:
    """The known models."""
    rows = [
        f"| `{name}` | {one.parameters / 1e6:.0f}M | {one.licence} | {one.size / 1e6:.0f} MB | {one.note} |"
        for name, one in catalog.CATALOG.items()
    ]
    for name, variant in catalog.VARIANTS.items():
        base = catalog.CATALOG[variant.base]
        rows.append(f"| `{name}` | {base.parameters / 1e6:.0f}M | {base.licence} | built on first use | {variant.note} |")
    rows += [f"| `{name}` | {size} | {licence} | on the hub | |" for name, (size, licence) in catalog.HUB_EXAMPLES.items()]
    return "\n".join(["| name | parameters | licence | download | note |", "|---|---|---|---|---|", *rows])


if __name__ == "__main__":
    sys.exit(main())
