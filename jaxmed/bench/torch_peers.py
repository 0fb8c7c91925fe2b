"""The PyTorch side of `jaxmed bench`: a process of its own, so that PyTorch's and XLA's thread pools never compete.

`python -m jaxmed.bench.torch_peers` reads one JSON request per line and answers each with one JSON line. The first request
is `{"op": "setup", "model": PATH, "base": [...], "source": [...], "target": [...], "foil": [...]}` (with `dtype`, `threads`,
`device`, and `random` instead of `model` where they matter); then `{"op": NAME, "layer": l, "count": n}` times one of `PEERS`;
`{"op": "quit"}` ends. The outcome is log-odds at the last token; the patched sites are neurons 0..count-1 of that token.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch users know
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

from jaxmed.errors import UserError, unknown
from jaxmed.models.checkpoints.gguf_file import open_gguf

HOOK_BATCH = 32
CHUNK = 1536
SHAPE_KEYS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "neurons": "intermediate_size",
    "vocabulary": "vocab_size",
    "rope_base": "rope_theta",
    "tied": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
"""Keys of a setup's `random` shapes -> keys of a Llama config."""


class Weights(NamedTuple):
    """One layer's matrices as [out, in], queries, keys and values fused, gate and up fused; and its norms [D]."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor


class Earlier(NamedTuple):
    """What the last token sees of the base run, in one layer: rotated keys [K, H, S] and values [K, S, H] of the tokens before it."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Ready:
    """A model and a pair, ready to be measured.

    Attributes:
        ids: int [1, T], the base prompt.
        target, foil: int, answer tokens.
        base_outcome, source_outcome: log-odds of the two runs.
        value: [L, F], neurons of the source run at its last token.
        delta: [L, F], source minus base.
        residual: list of [D], residual_out of the base run at the last token.
        weights, earlier: per layer, for the suffix peers.
        angles: cosines and sines [H] at the last position.
        answers: [R, D], unembedding rows of target and foil.
    """

    model: Any
    ids: Tensor
    target: Tensor
    foil: Tensor
    base_outcome: float
    source_outcome: float
    value: Tensor
    delta: Tensor
    residual: list[Tensor]
    weights: list[Weights]
    earlier: list[Earlier]
    angles: tuple[Tensor, Tensor]
    answers: Tensor


def set_up(request: dict[str, Any]) -> Ready:
    """Loads the model and runs base and source once."""
    torch.set_num_threads(request.get("threads", 2))
    torch.set_float32_matmul_precision("highest")
    device = torch.device(request.get("device", "cpu"))
    model = _load(request, getattr(torch, request.get("dtype", "float32")), device).eval()
    target, foil = (torch.tensor(request[name], device=device) for name in ("target", "foil"))
    runs = [torch.tensor([request[name]], device=device) for name in ("base", "source")]
    (base, neurons, residual, cache), (source, value, _, _) = (_record(model, ids) for ids in runs)
    position = torch.tensor([[runs[0].shape[1] - 1]], device=device)
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32, device=device), position)
    earlier = [Earlier(x.keys[0, :, :-1].transpose(1, 2).contiguous(), x.values[0, :, :-1].contiguous()) for x in cache.layers]
    outcomes = [float(_log_odds(logits, target, foil)) for logits in (base, source)]
    answers = model.lm_head.weight[torch.cat([target, foil])]
    delta = value.float() - neurons.float()
    weights = [_fuse(layer) for layer in model.model.layers]
    return Ready(model, runs[0], target, foil, *outcomes, value, delta, residual, weights, earlier, (cos[0, 0], sin[0, 0]), answers)


def _load(request: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    shapes = request.get("random")
    if shapes:
        for key in shapes.keys() - SHAPE_KEYS.keys():
            raise unknown("shape", key, SHAPE_KEYS)
        torch.manual_seed(0)
        with device, _default_dtype(dtype):
            return LlamaForCausalLM(_llama_config({SHAPE_KEYS[key]: value for key, value in shapes.items()}))
    path = Path(request["model"])
    if path.suffix != ".gguf":
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, local_files_only=True).to(device)
    else:
        file = open_gguf(path)
        model = LlamaForCausalLM(_llama_config(dict(file.config)))
        model.load_state_dict({name: torch.from_numpy(file.read(name)) for name in file.shapes}, strict="lm_head.weight" in file.shapes)
        model = model.to(device=device, dtype=dtype)
    config = model.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        raise UserError(f"The PyTorch peers know plain Llama models (no biases, SiLU); {path} is a {config.model_type}.")
    return model


def _llama_config(fields: dict[str, Any]) -> LlamaConfig:
    if "rope_scaling" in fields:
        raise UserError("The PyTorch peers read no GGUF file with RoPE factors; give the Hugging Face folder of this model.")
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta", 10000.0)}
    return LlamaConfig(**{**fields, "model_type": "llama"}, rope_parameters=rope)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _record(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Any]:
    """Logits [V], neurons [L, F] and residual_out (L of [D]), all at the last token, and the key/value cache."""
    neurons, residual, hooks = [], [], []
    for layer in model.model.layers:
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: neurons.append(inputs[0][0, -1].clone())))
        hooks.append(layer.register_forward_hook(lambda _, inputs, h: residual.append(h[0, -1].float())))
    done = model(ids, use_cache=True)
    for hook in hooks:
        hook.remove()
    return done.logits[0, -1], torch.stack(neurons), residual, done.past_key_values


def _fuse(layer: Any) -> Weights:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    return Weights(qkv, attention.o_proj.weight, gate_up, mlp.down_proj.weight, *norms)


def _log_odds(logits: Tensor, target: Tensor, foil: Tensor) -> Tensor:
    logits = logits.float()
    return torch.logsumexp(logits[..., target], -1) - torch.logsumexp(logits[..., foil], -1)


def hooks(ready: Ready, layer: int, count: int, batch: int, **arguments: Any) -> Tensor:
    """Effects by full forwards of `batch` identical prompts, each row with one neuron patched by a forward pre-hook."""
    module, effects = ready.model.model.layers[layer].mlp.down_proj, []
    for start in range(0, count, batch):
        neurons = torch.arange(start, min(start + batch, count), device=ready.ids.device)

        def patch(_: Any, inputs: tuple[Tensor], neurons: Tensor = neurons) -> None:
            inputs[0][torch.arange(len(neurons), device=neurons.device), -1, neurons] = ready.value[layer, neurons]

        hook = module.register_forward_pre_hook(patch)
        logits = ready.model(ready.ids.expand(len(neurons), -1), **arguments).logits[:, -1]
        hook.remove()
        effects.append(_log_odds(logits, ready.target, ready.foil) - ready.base_outcome)
    return torch.cat(effects)


def suffix(ready: Ready, layer: int, count: int, chunk: int, run: Callable[..., Tensor]) -> Tensor:
    """Effects by restarting at `layer + 1` on the last token alone; the units are the rows [U, D] of every matmul."""
    down, delta, effects = ready.weights[layer].down, ready.delta[layer], []
    eps = ready.model.config.rms_norm_eps
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        h = torch.addcmul(ready.residual[layer], delta[start:stop, None], down[:, start:stop].t().contiguous().float())
        h = F.pad(h, (0, 0, 0, chunk - len(h)))  # one shape, so one compilation
        for weights, earlier in zip(ready.weights[layer + 1 :], ready.earlier[layer + 1 :], strict=True):
            h = run(h, weights, earlier, *ready.angles, eps)
        x = _norm(h[: stop - start], ready.model.model.norm.weight, eps)
        target, foil = F.linear(x, ready.answers).float().split([len(ready.target), len(ready.foil)], dim=-1)
        effects.append(target.logsumexp(-1) - foil.logsumexp(-1) - ready.base_outcome)
    return torch.cat(effects)


def run_layer(h: Tensor, weights: Weights, earlier: Earlier, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """One Llama block on one token per row, float32 [U, D] -> [U, D]; the rows share the keys and values of earlier tokens."""
    (kv_heads, width, _), rows = earlier.key.shape, len(h)
    heads = weights.out.shape[1] // width
    qkv = F.linear(_norm(h, weights.attention_norm, eps), weights.qkv).view(rows, heads + 2 * kv_heads, width)
    first, second = qkv[:, : heads + kv_heads].float().chunk(2, dim=-1)
    rotated = torch.cat(
        [first * cos[: width // 2] - second * sin[: width // 2], second * cos[: width // 2] + first * sin[: width // 2]], -1
    )
    query = rotated[:, :heads].view(rows, kv_heads, -1, width).transpose(0, 1)  # [K, U, G, H]
    key, value = (x.transpose(0, 1)[:, :, None] for x in (rotated[:, heads:], qkv[:, heads + kv_heads :]))  # [K, U, 1, H]
    scores = torch.bmm(query.reshape(kv_heads, -1, width).to(qkv.dtype), earlier.key).view(*query.shape[:3], -1).float()
    scores = torch.cat([scores, (query * key).sum(-1, keepdim=True)], dim=-1)
    pattern = torch.softmax(scores * width**-0.5, dim=-1).to(qkv.dtype)
    mixed = torch.bmm(pattern[..., :-1].reshape(kv_heads, -1, earlier.key.shape[2]), earlier.value)
    mixed = mixed.view(query.shape) + pattern[..., -1:] * value
    h = h + F.linear(mixed.transpose(0, 1).reshape(rows, -1), weights.out)
    gate, up = F.linear(_norm(h, weights.mlp_norm, eps), weights.gate_up).chunk(2, dim=-1)
    return h + F.linear(F.silu(gate) * up, weights.down)


def _norm(h: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(h, h.shape[-1:], scale.float(), eps).to(scale.dtype)


@cache
def compiled_layer() -> Callable[..., Tensor]:
    """`run_layer` under `torch.compile`; compiled at its first call for a number of rows."""
    return torch.compile(run_layer, dynamic=False)


def matmuls(ready: Ready, layer: int, count: int, chunk: int) -> Tensor:
    """The matmuls of `suffix` and nothing else; there are no effects."""
    device, dtype = ready.answers.device, ready.answers.dtype
    sizes = {matrix.shape[1] for matrix in [*ready.weights[0][:4], ready.answers]}
    rows = {size: torch.randn(chunk, size, device=device, dtype=dtype) for size in sizes}
    for _ in range(0, count, chunk):
        for weights in ready.weights[layer + 1 :]:
            for matrix in weights[:4]:
                F.linear(rows[matrix.shape[1]], matrix)
        F.linear(rows[ready.answers.shape[1]], ready.answers)
    return torch.zeros(0)


def matmul_work(ready: Ready, layer: int, count: int, chunk: int) -> float:
    """Floating-point operations of `matmuls`."""
    weights = sum(matrix.numel() for weights in ready.weights[layer + 1 :] for matrix in weights[:4])
    return 2.0 * -(-count // chunk) * chunk * (weights + ready.answers.numel())


PEERS: dict[str, Callable[..., Tensor]] = {
    "hooks-one": lambda ready, layer, count, chunk: hooks(ready, layer, count, 1),
    "hooks-batch": lambda ready, layer, count, chunk: hooks(ready, layer, count, HOOK_BATCH),
    "hooks-batch-keep": lambda ready, layer, count, chunk: hooks(ready, layer, count, HOOK_BATCH, logits_to_keep=1),
    "suffix-eager": partial(suffix, run=run_layer),
    "suffix-compile": lambda ready, layer, count, chunk: suffix(ready, layer, count, chunk, compiled_layer()),
    "matmuls": matmuls,
}


def measure(ready: Ready, warm: set[tuple[str, int]], request: dict[str, Any]) -> dict[str, Any]:
    """Runs one peer `repeat` times: the median seconds, the first effects, and how many neurons each run did."""
    op, layer, (layers, neurons) = request["op"], request["layer"], ready.delta.shape
    count = request.get("count") or neurons
    if op not in PEERS:
        raise unknown("op", op, PEERS)
    if not (0 <= layer < layers and 0 < count <= neurons):
        raise UserError(f"layer {layer} or count {count} is out of range; the model has {layers} layers of {neurons} neurons.")
    chunk = min(request.get("chunk") or CHUNK, count)
    answer: dict[str, Any] = {"op": op, "layer": layer, "neurons": count, "chunk": chunk}
    if (op, chunk) not in warm:  # caches, kernels and compilation, by one batch through the last two layers
        seconds, _ = _timed(ready, partial(PEERS[op], ready, max(layers - 2, 0), min(count, HOOK_BATCH), chunk))
        answer["compile_seconds" if op == "suffix-compile" else "warm_seconds"] = seconds
        warm.add((op, chunk))
    runs = [_timed(ready, partial(PEERS[op], ready, layer, count, chunk)) for _ in range(request.get("repeat", 1))]
    seconds = sorted(seconds for seconds, _ in runs)[len(runs) // 2]
    if op == "matmuls":
        answer["gflops"] = matmul_work(ready, layer, count, chunk) / seconds / 1e9
    return {**answer, "seconds": seconds, "effects": runs[-1][1][:8].tolist()}


def _timed(ready: Ready, run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    wait = torch.cuda.synchronize if ready.ids.is_cuda else (lambda: None)
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """One answer per request line, until `quit`; whatever goes wrong is an answer too."""
    ready, warm = None, set()
    for line in lines:
        try:
            request = json.loads(line)
            if request["op"] == "quit":
                return
            if request["op"] == "setup":
                ready, warm = set_up(request), set()
                shape = {"layers": len(ready.weights), "neurons": ready.delta.shape[1], "dtype": str(ready.delta.dtype)}
                outcomes = {"base_outcome": ready.base_outcome, "source_outcome": ready.source_outcome}
                yield {"ok": True, "torch": torch.__version__, "threads": torch.get_num_threads(), **shape, **outcomes}
            elif ready is None:
                raise UserError("The first request must be a setup.")
            else:
                yield measure(ready, warm, request)
        except Exception as error:  # the parent reads one line per request, so any failure becomes one line
            yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Serves stdin and stdout; whatever libraries print goes to stderr."""
    logging.disable_progress_bar()
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
        for answer in answers(sys.stdin):
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
