"""What the tests of experiments share: matched examples, and masks of them."""

from __future__ import annotations

from dataclasses import replace

import jaxmed as jm

BEHAVIOUR = [jm.Example(f"ask {i}" + "x" * (5 * i % 13), f"no {'abc'[i % 3] * (i % 4 + 1)}", kind="harmful") for i in range(12)]
TWINS = [replace(one, response=f"yes {i}", kind="benign") for i, one in enumerate(BEHAVIOUR)]
