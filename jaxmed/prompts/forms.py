"""How prompt and response are joined: one vocabulary for every command.

A new form is one row of `FORMS`.
"""

from __future__ import annotations

from jaxmed.errors import unknown

FORMS: dict[str, tuple[str, str]] = {"plain": ("{}", "\n"), "space": ("{}", " "), "qa": ("Q: {}\nA:", " "), "chat": ("{}", "")}
"""Form -> (what the prompt becomes, what stands between prompt and response); "chat" is the model's chat template."""


def check_form(form: str) -> str:
    """The form; a UserError with the legal ones where it is unknown."""
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    return form
