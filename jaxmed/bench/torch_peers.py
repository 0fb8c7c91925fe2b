"""The PyTorch side of `jaxmed bench`: a process of its own, so that PyTorch's and XLA's thread pools never compete.

`python -m jaxmed.bench.torch_peers` reads one JSON request per line and answers each with one JSON line. The first request
is `{"op": "setup", "model": PATH, "base": [...], "source": [...], "target": [...], "foil": [...]}` (with `dtype`, `threads`,
`device`, and `random` shapes instead of `model`, where wanted); then `{"op": NAME, "layer": l, "count": n}` times one of
`PEERS`; `{"op": "quit"}` ends. The outcome is log-odds at the last token; the units are neurons 0..n-1 of that token.
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
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, logging

from jaxmed.errors import UserError, unknown
from jaxmed.models.checkpoints.gguf_file import open_gguf

CHUNK = 1536
SHAPES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "neurons": "intermediate_size",
    "vocabulary": "vocab_size",
    "rope_base": "rope_theta",
    "tied": "tie_word_embeddings",
}
"""Keys of a setup's `random` -> keys of a Llama config."""


class Layer(NamedTuple):
    """One layer for the suffix peers: matrices as [out, in], norms [D], and the base run's keys and values of earlier tokens."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    key: Tensor  # [K, H, S], rotated
    value: Tensor  # [K, S, H]


@dataclass(frozen=True)
class Ready:
    """A model and a pair, ready to be measured.

    Attributes:
        ids: int [1, T], the base prompt.
        answers: int [R], target tokens first, of which there are `targets`; `rows` [R, D] are their rows of the unembedding.
        outcomes: log-odds of base and source.
        value, delta: [L, F], the source's neurons at its last token, and source minus base (float32).
        residual: float32 [L, D], residual_out of the base run at its last token.
        angles: cosines and sines [H] at the last position.
    """

    model: Any
    ids: Tensor
    answers: Tensor
    targets: int
    rows: Tensor
    outcomes: tuple[float, float]
    value: Tensor
    delta: Tensor
    residual: Tensor
    angles: tuple[Tensor, Tensor]
    layers: list[Layer]


def set_up(request: dict[str, Any]) -> Ready:
    """Loads the model and runs base and source once."""
    torch.set_num_threads(request.get("threads", 2))
    torch.set_float32_matmul_precision("highest")
    device = torch.device(request.get("device", "cpu"))
    model = load(request, getattr(torch, request.get("dtype", "float32")), device).eval()
    ids, answers = torch.tensor([request["base"]], device=device), torch.tensor(request["target"] + request["foil"], device=device)
    logits, neurons, residual, past = record(model, ids)
    source, value, _, _ = record(model, torch.tensor([request["source"]], device=device))
    targets, delta = len(request["target"]), value.float() - neurons.float()
    outcomes = (float(log_odds(logits[answers], targets)), float(log_odds(source[answers], targets)))
    cos, sin = model.model.rotary_emb(residual, torch.tensor([[ids.shape[1] - 1]], device=device))
    layers = [fuse(layer, cached.keys[0], cached.values[0]) for layer, cached in zip(model.model.layers, past.layers, strict=True)]
    return Ready(
        model, ids, answers, targets, model.lm_head.weight[answers], outcomes, value, delta, residual, (cos[0, 0], sin[0, 0]), layers
    )


def load(request: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """The Llama model of a setup request: a folder, a GGUF file, or random weights of given shapes."""
    if request.get("random"):
        for key in request["random"].keys() - SHAPES.keys():
            raise unknown("shape", key, SHAPES)
        torch.manual_seed(0)
        with device:
            return _build({SHAPES[key]: value for key, value in request["random"].items()}, dtype)
    path = Path(request["model"])
    if path.suffix == ".gguf":
        file = open_gguf(path)
        model = _build(dict(file.config), torch.float32)
        weights = {name: torch.tensor(file.read(name)) for name in file.shapes}
        model.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"], **weights})  # tied: no head in the file
        return model.to(device, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, local_files_only=True)
    config = model.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        raise UserError(f"{path} is a {config.model_type} model; the PyTorch peers know Llama models with SiLU and without biases.")
    return model.to(device)


def _build(fields: dict[str, Any], dtype: torch.dtype) -> Any:
    if "rope_scaling" in fields:
        raise UserError("The PyTorch peers read no GGUF file with RoPE factors; give the Hugging Face folder of this model.")
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta", 10000.0)}
    fields.pop("model_type", None)
    return AutoModelForCausalLM.from_config(LlamaConfig(**fields, rope_parameters=rope), dtype=dtype)


def record(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Logits [V], neurons [L, F] and residual_out float32 [L, D], all at the last token, and the key/value cache."""
    neurons, residual, handles = [], [], []
    for layer in model.model.layers:
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: neurons.append(inputs[0][0, -1].clone())))
        handles.append(layer.register_forward_hook(lambda _, inputs, h: residual.append(h[0, -1].float())))
    done = model(ids, use_cache=True)
    for handle in handles:
        handle.remove()
    return done.logits[0, -1], torch.stack(neurons), torch.stack(residual), done.past_key_values


def fuse(layer: Any, key: Tensor, value: Tensor) -> Layer:
    """One transformers layer and its cache (key and value [K, T, H]) as the suffix peers want them."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    earlier = (key[:, :-1].transpose(1, 2).contiguous(), value[:, :-1].contiguous())
    return Layer(qkv, attention.o_proj.weight, gate_up, mlp.down_proj.weight, *norms, *earlier)


def log_odds(logits: Tensor, targets: int) -> Tensor:
    """Answer logits [..., R], the targets first -> their logsumexp minus that of the others (the foils)."""
    logits = logits.float()
    return logits[..., :targets].logsumexp(-1) - logits[..., targets:].logsumexp(-1)


def hooks(ready: Ready, layer: int, count: int, chunk: int, **arguments: Any) -> Tensor:
    """Effects by full forwards of `chunk` identical prompts, each row with one neuron patched by a forward pre-hook."""
    module, effects = ready.model.model.layers[layer].mlp.down_proj, []
    for start in range(0, count, chunk):
        neurons = torch.arange(start, min(start + chunk, count), device=ready.ids.device)

        def patch(_: Any, inputs: tuple[Tensor], neurons: Tensor = neurons) -> None:
            inputs[0][torch.arange(len(neurons), device=neurons.device), -1, neurons] = ready.value[layer, neurons]

        with module.register_forward_pre_hook(patch):
            logits = ready.model(ready.ids.expand(len(neurons), -1), **arguments).logits[:, -1]
        effects.append(log_odds(logits[:, ready.answers], ready.targets) - ready.outcomes[0])
    return torch.cat(effects)


def suffix(ready: Ready, layer: int, count: int, chunk: int, run: Callable[..., Tensor]) -> Tensor:
    """Effects by restarting at `layer + 1` on the last token alone; the units are the rows [U, D] of every matmul."""
    down, delta, eps, effects = ready.layers[layer].down, ready.delta[layer], ready.model.config.rms_norm_eps, []
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        h = torch.addcmul(ready.residual[layer], delta[start:stop, None], down[:, start:stop].t().contiguous().float())
        h = F.pad(h, (0, 0, 0, chunk - len(h)))  # one shape, so one compilation
        for weights in ready.layers[layer + 1 :]:
            h = run(h, weights, *ready.angles, eps)
        x = norm(h[: stop - start], ready.model.model.norm.weight, eps)
        effects.append(log_odds(F.linear(x, ready.rows), ready.targets) - ready.outcomes[0])
    return torch.cat(effects)


def run_layer(h: Tensor, layer: Layer, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """One Llama block on one token per row, float32 [U, D] -> [U, D]; all rows share the earlier tokens' keys and values."""
    (kv_heads, width, length), rows = layer.key.shape, len(h)
    heads = layer.out.shape[1] // width
    qkv = F.linear(norm(h, layer.attention_norm, eps), layer.qkv).view(rows, -1, width)
    straight = qkv[:, : heads + kv_heads].float()
    first, second = straight.chunk(2, dim=-1)
    rotated = straight * cos + torch.cat([-second, first], dim=-1) * sin
    query = rotated[:, :heads].view(rows, kv_heads, -1, width).transpose(0, 1)  # [K, U, G, H]
    key, value = (x.transpose(0, 1)[:, :, None] for x in (rotated[:, heads:], qkv[:, heads + kv_heads :]))  # [K, U, 1, H]
    scores = torch.bmm(query.reshape(kv_heads, -1, width).to(qkv.dtype), layer.key).view(kv_heads, rows, -1, length).float()
    scores = torch.cat([scores, (query * key).sum(-1, keepdim=True)], dim=-1)
    pattern = torch.softmax(scores * width**-0.5, dim=-1).to(qkv.dtype)
    mixed = torch.bmm(pattern[..., :-1].reshape(kv_heads, -1, length), layer.value).view(query.shape) + pattern[..., -1:] * value
    h = h + F.linear(mixed.transpose(0, 1).reshape(rows, -1), layer.out)
    gate, up = F.linear(norm(h, layer.mlp_norm, eps), layer.gate_up).chunk(2, dim=-1)
    return h + F.linear(F.silu(gate) * up, layer.down)


def norm(h: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm in float32, returned in the weights' dtype."""
    return F.rms_norm(h, h.shape[-1:], scale.float(), eps).to(scale.dtype)


@cache
def compiled_layer() -> Callable[..., Tensor]:
    """`run_layer` under `torch.compile`; it compiles at its first call for a number of rows."""
    return torch.compile(run_layer, dynamic=False)


def matmuls(ready: Ready, layer: int, count: int, chunk: int) -> Tensor:
    """The matmuls of `suffix` and nothing else; there are no effects."""
    matrices = [matrix for weights in ready.layers[layer + 1 :] for matrix in weights[:4]] + [ready.rows]
    rows = {size: ready.rows.new_ones(chunk, size) for size in {matrix.shape[1] for matrix in matrices}}
    for _ in range(0, count, chunk):
        for matrix in matrices:
            F.linear(rows[matrix.shape[1]], matrix)
    return torch.zeros(0)


PEERS: dict[str, tuple[Callable[..., Tensor], int | None]] = {
    "hooks-one": (hooks, 1),
    "hooks-batch": (hooks, 32),
    "hooks-batch-keep": (partial(hooks, logits_to_keep=1), 32),
    "suffix-eager": (partial(suffix, run=run_layer), None),
    "suffix-compile": (partial(suffix, run=lambda *inputs: compiled_layer()(*inputs)), None),
    "matmuls": (matmuls, None),
}
"""Name -> (measured function, its rows per pass; None: the request's `chunk`)."""


def measure(ready: Ready, warm: set[tuple[str, int]], request: dict[str, Any]) -> dict[str, Any]:
    """Runs one peer `repeat` times: the median seconds, the first effects, and how many neurons each run did."""
    op, layer, (layers, neurons) = request["op"], request["layer"], ready.delta.shape
    if op not in PEERS:
        raise unknown("op", op, PEERS)
    count = request.get("count", neurons)
    if not (0 <= layer < layers and 0 < count <= neurons):
        raise UserError(f"layer {layer} or count {count} is out of range; the model has {layers} layers of {neurons} neurons.")
    peer, rows = PEERS[op]
    chunk = min(rows or request.get("chunk", CHUNK), count)
    answer: dict[str, Any] = {"op": op, "layer": layer, "neurons": count, "chunk": chunk}
    if (op, chunk) not in warm:  # kernels, buffers and compilation: one chunk through the last layer
        seconds, _ = timed(ready, partial(peer, ready, max(layers - 2, 0), chunk, chunk))
        answer["compile_seconds" if op == "suffix-compile" else "warm_seconds"] = seconds
        warm.add((op, chunk))
    runs = [timed(ready, partial(peer, ready, layer, count, chunk)) for _ in range(request.get("repeat", 1))]
    seconds = sorted(seconds for seconds, _ in runs)[len(runs) // 2]
    if op == "matmuls":
        weights = sum(matrix.numel() for later in ready.layers[layer + 1 :] for matrix in later[:4]) + ready.rows.numel()
        answer["gflops"] = 2e-9 * -(-count // chunk) * chunk * weights / seconds
    return {**answer, "seconds": seconds, "effects": runs[-1][1][:8].tolist()}


def timed(ready: Ready, run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Wall seconds of a call, the device's work included, and its result."""
    wait = torch.cuda.synchronize if ready.ids.is_cuda else (lambda: None)
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def answer_all(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """One answer per request line, until `quit`; whatever goes wrong is an answer too."""
    ready, warm = None, set()
    for line in lines:
        try:
            request = json.loads(line)
            if request["op"] == "quit":
                return
            if request["op"] == "setup":
                ready, warm = set_up(request), set()
                yield {"ok": True, "torch": torch.__version__, "threads": torch.get_num_threads(), "outcomes": ready.outcomes}
            elif ready is None:
                raise UserError('The first request must be {"op": "setup", ...}.')
            else:
                yield measure(ready, warm, request)
        except Exception as error:  # the parent reads one line per request, so any failure becomes one line
            yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Serves stdin and stdout; whatever libraries print goes to stderr."""
    logging.disable_progress_bar()
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
        for answer in answer_all(sys.stdin):
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
