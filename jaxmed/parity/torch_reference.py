"""Activations of every named site, computed by transformers: a process of its own, so that the package never imports torch.

`python -m jaxmed.parity.torch_reference FOLDER OUT DTYPE` reads token ids from stdin (one JSON list) and writes a reference file:
safetensors with `tokens` [T], `logits` [T, V] and one array [L, T, ...] per site.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

Part = tuple[Any, bool]
"""A module, and whether its input is meant and not its output."""


def site_modules(layer: Any) -> dict[str, Part]:
    """Where transformers computes each site, for a layer of any family. "qkv" is query, key and value in one."""
    if hasattr(layer, "ln_1"):
        return {
            "residual_in": (layer.ln_1, True),
            "qkv": (layer.attn.c_attn, False),
            "head_out": (layer.attn.c_proj, True),
            "attention_out": (layer.attn, False),
            "residual_mid": (layer.ln_2, True),
            "gate": (layer.mlp.c_fc, False),
            "neuron": (layer.mlp.c_proj, True),
            "mlp_out": (layer.mlp, False),
            "residual_out": (layer, False),
        }
    attention = layer.self_attn
    found: dict[str, Part] = {"residual_in": (layer, True), "residual_out": (layer, False), "head_out": (attention.o_proj, True)}
    if hasattr(attention, "qkv_proj"):
        found["qkv"] = (attention.qkv_proj, False)
    else:
        found["query"] = (getattr(attention, "q_norm", attention.q_proj), False)
        found["key"] = (getattr(attention, "k_norm", attention.k_proj), False)
        found["value"] = (attention.v_proj, False)
    post_norms = hasattr(layer, "post_feedforward_layernorm")
    found["attention_out"] = (layer.post_attention_layernorm if post_norms else attention.o_proj, False)
    before_mlp = getattr(layer, "pre_feedforward_layernorm", layer.mlp if post_norms else layer.post_attention_layernorm)
    found["residual_mid"] = (before_mlp, True)
    found["mlp_out"] = (layer.post_feedforward_layernorm if post_norms else layer.mlp, False)
    found["experts" if hasattr(layer.mlp, "experts") else "neuron"] = (getattr(layer.mlp, "down_proj", layer.mlp), True)
    for name, part in (("gate", "gate_proj"), ("up", "up_proj"), ("gate_up", "gate_up_proj")):
        if hasattr(layer.mlp, part):
            found[name] = (getattr(layer.mlp, part), False)
    return found


def _all_experts(experts: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Both branches and every neuron of every expert [B, T, X * M], for a mixture's input x [B, T, D]."""
    gate, up = torch.einsum("btd,xcd->btxc", x, experts.gate_up_proj).chunk(2, dim=-1)
    return {"gate": gate.flatten(2), "up": up.flatten(2), "neuron": (experts.act_fn(gate) * up).flatten(2)}


def run(model: Any, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits float32 [B, T, V] and every named site float32 [L, B, T, ...] (heads flattened) for token ids [B, T].

    `model` is a causal language model of transformers with eager attention.
    """
    decoder = model.transformer if hasattr(model, "transformer") else model.model
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, of_input: bool) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = inputs[0] if of_input else output
            value = (value[0] if isinstance(value, tuple) else value).detach().clone()
            heads_first = value.ndim == 4 and value.shape[2] == ids.shape[1]  # Gemma 3 norms its heads after moving them there
            seen.setdefault(name, []).append(value.transpose(1, 2) if heads_first else value)

        return hook

    places = [(name, part) for layer in layers for name, part in site_modules(layer).items()]
    handles = [module.register_forward_hook(keep(name, of_input)) for name, (module, of_input) in places]
    with torch.no_grad():
        output = model(torch.as_tensor(ids), output_attentions=True)
    for handle in handles:
        handle.remove()
    found = _stack(model.config, layers, seen)
    found["attention_pattern"] = np.stack([pattern.float().numpy() for pattern in output.attentions])
    return output.logits.float().numpy(), found


def _stack(config: Any, layers: Any, seen: dict[str, list[torch.Tensor]]) -> dict[str, np.ndarray]:
    if "qkv" in seen:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width
        parts = [value.split([config.num_attention_heads * width, keys, keys], dim=-1) for value in seen.pop("qkv")]
        seen |= {name: [part[number] for part in parts] for number, name in enumerate(("query", "key", "value"))}
    if "experts" in seen:
        computed = [_all_experts(layer.mlp.experts, x) for layer, x in zip(layers, seen.pop("experts"), strict=True)]
        seen |= {name: [one[name] for one in computed] for name in computed[0]}
    if "gate_up" in seen:
        both = [value.chunk(2, dim=-1) for value in seen.pop("gate_up")]
        seen |= {name: [one[number] for one in both] for number, name in enumerate(("gate", "up"))}
    for name in ("attention_out", "mlp_out"):
        seen[name] = [value * getattr(config, "residual_multiplier", 1.0) for value in seen[name]]
    stacked = {name: torch.stack(values).detach().float().numpy() for name, values in seen.items()}
    return {name: a.reshape(*a.shape[:3], -1) for name, a in stacked.items()}


def main(folder: str, out: str, dtype: str) -> None:
    """Writes the reference file of a model folder for the token ids on stdin."""
    transformers.logging.disable_progress_bar()
    ids = np.asarray([json.loads(sys.stdin.read())])
    with contextlib.redirect_stdout(sys.stderr):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True, trust_remote_code=False
        ).eval()
        logits, sites = run(model, ids)
    arrays = {"tokens": ids[0].astype(np.int32), "logits": logits[0], **{name: np.ascontiguousarray(a[:, 0]) for name, a in sites.items()}}
    save_file(arrays, out, {"dtype": dtype, "made_by": f"transformers {transformers.__version__}, torch {torch.__version__}"})


if __name__ == "__main__":
    main(*sys.argv[1:])
