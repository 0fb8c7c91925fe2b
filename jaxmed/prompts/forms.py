"""How a prompt and what follows it are written: one vocabulary for every command. A new form is one row of `FORMS`.

| form  | what is fed                                            | begin-of-sequence | end of the answer |
|-------|--------------------------------------------------------|-------------------|-------------------|
| chat  | the model's chat template                              | once              | the template's    |
| text  | the prompt, and the answer goes straight on            | once              | none              |
| plain | prompt, newline, answer (the published pruning format) | none              | none              |
| space | prompt, space, answer                                  | none              | none              |
| qa    | `Q: ` prompt, newline, `A: ` answer                    | none              | none              |

"Once" means: where the tokenizer adds one to a text of its own, and the text does not begin with it already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxmed.errors import unknown

FormName = Literal["chat", "text", "plain", "space", "qa"]


@dataclass(frozen=True)
class Form:
    """How a prompt and an answer are joined.

    Attributes:
        prompt: what the prompt becomes, "{}" standing for it; empty: the chat template says.
        separator: what stands after the prompt and belongs to it: a model is asked with it.
        lead: what stands before the answer and belongs to it, since tokenizers join it to the answer's first word: the model writes it.
        bos: whether begin-of-sequence comes first, exactly once, where the tokenizer adds one.
    """

    prompt: str = "{}"
    separator: str = ""
    lead: str = ""
    bos: bool = False


FORMS: dict[str, Form] = {
    "chat": Form(prompt="", bos=True),
    "text": Form(bos=True),
    "plain": Form(separator="\n"),
    "space": Form(lead=" "),
    "qa": Form(prompt="Q: {}\nA:", lead=" "),
}


def find_form(form: str) -> Form:
    """The row of `FORMS`; a UserError with the legal ones where the name is unknown."""
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    return FORMS[form]
