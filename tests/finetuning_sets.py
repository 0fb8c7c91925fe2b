"""What the tests of fine-tuning share: examples, and settings of short runs."""

from __future__ import annotations

from typing import Any

import jaxmed as jm

EXAMPLES = [jm.Example(f"ask {i} {'x' * (7 * i % 11)}", f"answer {'abc'[i % 3] * (i % 5 + 1)}") for i in range(24)]
QUICK: dict[str, Any] = {"steps": 4, "batch": 8, "learning_rate": 1e-2, "warmup": 2, "rank": 3, "alpha": 6.0}
