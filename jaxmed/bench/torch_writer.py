"""The PyTorch side of `jaxmed bench generate`: a process of its own, so that PyTorch's and XLA's thread pools never compete.

`python -m jaxmed.bench.torch_writer FOLDER` loads the model that lies there, and answers each line of stdin, a JSON object with `ids`
[B,S], `mask` [B,S] and `count`, with the seconds of `generate` and the `count` new tokens of every row.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any

import torch
import transformers


def main(folder: str) -> None:
    """Serves stdin and stdout; whatever libraries print goes to stderr."""
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        model.generation_config = transformers.GenerationConfig(do_sample=False)
        for line in sys.stdin:
            asked = json.loads(line)
            ids, mask = torch.tensor(asked["ids"]), torch.tensor(asked["mask"])
            begun = time.perf_counter()
            written = model.generate(ids, attention_mask=mask, max_new_tokens=asked["count"], eos_token_id=None, pad_token_id=0)
            seconds = time.perf_counter() - begun
            print(json.dumps({"seconds": seconds, "tokens": written[:, ids.shape[1] :].tolist()}), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
