"""The full forward: logits and sites against transformers, padding, residual identities, edits at every site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmed as jm
from jaxmed.interventions.sites import SITES, has_site
from jaxmed.models.config import Rope
from jaxmed.models.model import Model
from jaxmed.models.rope import rope_angles
from jaxmed.prompts import read_pairs
from jaxmed.tokens import render
from tests import tiny, tolerances

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def _reference(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    ],
    ids=["plain", "tied", "biases", "linear-rope", "llama3-rope", "new-rope-fields"],
)
def test_logits_equal_transformers(tmp_path: Path, changes: dict) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model", **{k: v for k, v in changes.items() if v is not None})
    tokens = np.random.default_rng(0).integers(0, 264, (2, 90))
    with torch.no_grad():
        wanted = _reference(folder)(torch.as_tensor(tokens)).logits.numpy()
    found = np.asarray(jm.forward(jm.load(str(folder)), tokens)[0])
    scale = max(1.0, float(np.abs(wanted).max()))
    assert np.abs(found - wanted).max() / scale <= tolerances.TINY_LOGITS


def test_every_site_equals_a_hook_in_transformers(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(0, 264, (1, 20))
    reference, seen = _reference(folder), {}

    def keep(name: str, of_input: bool = False):
        def hook(module, inputs, output):
            value = inputs[0] if of_input else output
            seen.setdefault(name, []).append((value[0] if isinstance(value, tuple) else value).detach().numpy())

        return hook

    for layer in reference.model.layers:
        layer.mlp.down_proj.register_forward_hook(keep("neuron", of_input=True))
        layer.mlp.gate_proj.register_forward_hook(keep("gate"))
        layer.mlp.up_proj.register_forward_hook(keep("up"))
        layer.mlp.register_forward_hook(keep("mlp_out"))
        layer.self_attn.o_proj.register_forward_hook(keep("attention_out"))
        layer.self_attn.o_proj.register_forward_hook(keep("head_out", of_input=True))
        layer.self_attn.q_proj.register_forward_hook(keep("query"))
        layer.self_attn.k_proj.register_forward_hook(keep("key"))
        layer.self_attn.v_proj.register_forward_hook(keep("value"))
        layer.input_layernorm.register_forward_hook(keep("residual_in", of_input=True))
        layer.post_attention_layernorm.register_forward_hook(keep("residual_mid", of_input=True))
        layer.register_forward_hook(keep("residual_out"))
    with torch.no_grad():
        output = reference(torch.as_tensor(tokens), output_attentions=True)
    seen["attention_pattern"] = [pattern.numpy() for pattern in output.attentions]
    found = jm.forward(jm.load(str(folder)), tokens, taps=tuple(SITES))[1]
    assert set(seen) == set(SITES)
    for name, layers in seen.items():
        wanted = np.stack(layers)
        assert np.abs(np.asarray(found[name]).reshape(wanted.shape) - wanted).max() <= tolerances.RESIDUAL, name


def test_default_model_equals_transformers(default_model: Model) -> None:
    from jaxmed.models.catalog import locate
    from jaxmed.models.checkpoints.gguf_file import open_gguf

    checkpoint = open_gguf(locate("smollm2-135m-instruct"))
    config = {key: value for key, value in checkpoint.config.items() if key != "model_type"}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, attn_implementation="eager")).eval()
    state = {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.shapes}
    assert reference.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    pair = read_pairs("harm")[0]
    for side in ("base", "source"):
        ids = render(default_model.tokenizer, pair, side).ids
        with torch.no_grad():
            wanted = reference(torch.as_tensor(ids[None])).logits.numpy()
        assert np.abs(np.asarray(jm.forward(default_model, ids)[0]) - wanted).max() <= tolerances.LOGITS


@pytest.mark.parametrize("pads", range(6))
def test_left_padding_changes_nothing(plain_model: Model, pads: int) -> None:
    ids = np.random.default_rng(3).integers(1, 264, 12)
    row = np.concatenate([np.zeros(pads, int), ids])
    other = np.random.default_rng(4).integers(1, 264, len(row))
    alone = np.asarray(jm.forward(plain_model, ids)[0][0])
    batched = np.asarray(jm.forward(plain_model, np.stack([row, other]), padding=[pads, 0])[0][0, pads:])
    assert np.abs(alone - batched).max() <= tolerances.PADDED


def test_the_pad_id_may_occur_inside_a_prompt(plain_model: Model) -> None:
    ids = np.asarray([0, 5, 0, 0, 9, 0])
    alone = np.asarray(jm.forward(plain_model, ids)[0][0])
    padded = np.asarray(jm.forward(plain_model, np.concatenate([[0, 0], ids])[None], padding=[2])[0][0, 2:])
    assert np.abs(alone - padded).max() <= tolerances.TINY_LOGITS


def test_edits_count_real_tokens_from_either_end(plain_model: Model) -> None:
    ids = np.random.default_rng(3).integers(1, 264, 12)
    row = np.concatenate([np.zeros(3, int), ids])[None]
    for position in (4, -2):
        edit = jm.edits.zero("mlp_out", layer=1, position=position)
        alone = np.asarray(jm.forward(plain_model, ids, edit)[0][0])
        padded = np.asarray(jm.forward(plain_model, row, edit, padding=[3])[0][0, 3:])
        assert np.abs(alone - padded).max() <= tolerances.TINY_LOGITS


def test_residual_stream_adds_up(tiny_model: Model) -> None:
    ids = np.random.default_rng(0).integers(0, 264, 15)
    sites = ("residual_in", "attention_out", "residual_mid", "mlp_out", "residual_out")
    r_in, attention, mid, mlp, out = (np.asarray(jm.forward(tiny_model, ids, taps=sites)[1][name]) for name in sites)
    assert np.abs(r_in + attention - mid).max() <= tolerances.RESIDUAL
    assert np.abs(mid + mlp - out).max() <= tolerances.RESIDUAL
    assert np.array_equal(out[:-1], r_in[1:])


def test_attention_rows_sum_to_one_and_are_causal(tiny_model: Model) -> None:
    pattern = np.asarray(jm.forward(tiny_model, np.arange(15), taps=("hook_pattern",))[1]["hook_pattern"])
    assert np.abs(pattern.sum(-1) - 1).max() <= 1e-5
    assert np.abs(np.triu(pattern, 1)).max() == 0


@pytest.mark.parametrize("site", SITES)
def test_patching_a_site_with_its_own_value_changes_nothing(tiny_model: Model, site: str) -> None:
    if not has_site(tiny_model.config.sizes, site):
        pytest.skip("its MLP has no such branch")
    ids = np.arange(10)
    logits, taps = jm.forward(tiny_model, ids, taps=(site,))
    again = jm.forward(tiny_model, ids, {site: jm.Edit(np.float32(1.0), taps[site])})[0]
    assert np.abs(np.asarray(logits) - np.asarray(again)).max() <= tolerances.TINY_LOGITS


@pytest.mark.parametrize("site", SITES)
def test_zeroing_a_site_changes_something(tiny_model: Model, site: str) -> None:
    if not has_site(tiny_model.config.sizes, site):
        pytest.skip("its MLP has no such branch")
    ids = np.arange(10)
    zeroed, taps = jm.forward(tiny_model, ids, jm.edits.zero(site, layer=1), taps=(site,))
    assert np.abs(np.asarray(zeroed) - np.asarray(jm.forward(tiny_model, ids)[0])).max() > 1e-3
    assert (np.asarray(taps[site][1]) == 0).all()
    assert (np.asarray(taps[site][0]) != 0).any()


def test_key_and_value_edits_reach_the_whole_group(plain_model: Model) -> None:
    ids = np.arange(10)
    pattern = lambda edits: np.asarray(jm.forward(plain_model, ids, edits, taps=("attention_pattern",))[1]["attention_pattern"][1, 0])  # noqa: E731
    changed = np.abs(pattern(jm.edits.zero("key", layer=1, unit=1)) - pattern(None)).max(axis=(1, 2)) > 0
    assert changed.tolist() == [False, False, True, True]


def test_an_edit_touches_only_its_entry(plain_model: Model) -> None:
    edit = jm.edits.resample("neuron", [7.5], layer=1, position=-3, unit=5)
    ids = np.arange(10)
    before, after = (np.array(jm.forward(plain_model, ids, e, taps=("neuron",))[1]["neuron"]) for e in (None, edit))
    assert after[1, 0, 7, 5] == 7.5
    after[1, 0, 7, 5] = before[1, 0, 7, 5]
    assert np.array_equal(before[:2], after[:2])


def test_swap_is_bit_exact_in_bfloat16() -> None:
    model = tiny.model("llama", dtype="bfloat16")
    source = jm.forward(model, np.arange(10), taps=("neuron",))[1]["neuron"]
    edits = {"neuron": jm.Edit(np.float32(1.0), source)}
    patched = jm.forward(model, np.arange(10)[::-1].copy(), edits, taps=("neuron",))[1]["neuron"]
    assert patched.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(patched, np.float32), np.asarray(source, np.float32))


def test_edits_are_data_for_vmap_and_grad(plain_model: Model) -> None:
    ids = jnp.arange(10)[None]
    at = jm.edits.where(1, -1, 3)

    def logit(gate, value):
        edits = {"neuron": jm.Edit(gate[None], value[None], jnp.zeros(1), None, at)}
        return jm.forward(plain_model, ids, edits)[0][0, -1, 7]

    values = jnp.asarray([0.0, 1.0, 2.0])
    many = jax.vmap(logit, in_axes=(None, 0))(jnp.asarray(1.0), values)
    assert np.allclose(many, [logit(jnp.asarray(1.0), v) for v in values], atol=1e-5)
    step = 1e-2
    slope = jax.grad(logit)(jnp.asarray(0.0), jnp.asarray(2.0))
    finite = (logit(jnp.asarray(step), jnp.asarray(2.0)) - logit(jnp.asarray(-step), jnp.asarray(2.0))) / (2 * step)
    assert float(slope) == pytest.approx(float(finite), rel=0.02)


def test_direction_ablation_leaves_no_component(plain_model: Model) -> None:
    direction = np.random.default_rng(0).normal(size=16)
    taps = jm.forward(plain_model, np.arange(9), jm.edits.ablate_direction("residual_out", direction), taps=("residual_out",))[1]
    assert np.abs(np.asarray(taps["residual_out"]) @ (direction / np.linalg.norm(direction))).max() <= 1e-4


def test_no_edits_and_no_taps_leave_no_trace(plain_model: Model) -> None:
    from jaxmed.runner import causal_layout, forward

    config, params, layout = plain_model.config, plain_model.params, causal_layout(1, 8)
    trace = lambda *rest: str(jax.make_jaxpr(lambda t: forward(config, params, t, layout, *rest))(jnp.ones((1, 8), int)))  # noqa: E731
    assert trace() == trace({}, ())
    assert len(trace(jm.edits.zero("neuron"))) > len(trace())


@pytest.mark.parametrize("lengths", [(20, 90), (90, 20), (64, 65), (20, 30)])
def test_longrope_takes_its_factors_row_by_row(lengths: tuple[int, int]) -> None:
    rope = Rope(1e4, "factors", original_length=64, factors=(2.0, 3.0, 5.0, 8.0), short_factors=(1.0, 1.1, 1.2, 1.3))
    longest = max(lengths)
    together = np.stack([np.minimum(np.arange(longest), length - 1) for length in lengths])
    both = rope_angles(rope, 8, jnp.asarray(together))
    for row, length in enumerate(lengths):
        alone = rope_angles(rope, 8, jnp.arange(length)[None])
        assert all(np.array_equal(np.asarray(a)[row, :length], np.asarray(b)[0]) for a, b in zip(both, alone, strict=True))


def test_a_jitted_function_of_a_model_holds_no_weights_as_constants(plain_model: Model) -> None:
    import jax

    def last(model: Model, ids: jax.Array) -> jax.Array:
        return jm.forward(model, ids, logits="last")[0]

    ids = np.arange(6)[None]
    program = jax.make_jaxpr(last)(plain_model, ids)
    weights = sum(leaf.size for leaf in jax.tree.leaves(plain_model.params))
    assert sum(np.size(constant) for constant in program.consts) < weights / 10
    jitted: Any = jax.jit(last)
    assert np.allclose(jitted(plain_model, ids), jm.forward(plain_model, ids)[0][:, -1:], atol=1e-5)
    halved = jax.tree.map(lambda leaf: leaf * 0.5, plain_model)
    assert not np.allclose(jitted(halved, ids), jitted(plain_model, ids), atol=1e-3)
    assert jitted._cache_size() == 1
    assert halved.identity != plain_model.identity


@pytest.mark.parametrize(("logits", "count"), [("all", 6), ("last", 1), ("none", 0)])
def test_logits_of_as_many_tokens_as_asked_for(plain_model: Model, logits: str, count: int) -> None:
    found, taps = jm.forward(plain_model, np.arange(6), taps=("mlp_out",), logits=logits)
    whole = jm.forward(plain_model, np.arange(6))[0]
    assert found.shape == (1, count, plain_model.config.vocabulary)
    assert np.allclose(found, whole[:, 6 - count :], atol=1e-5)
    assert taps["mlp_out"].shape[2] == 6


def test_other_amounts_of_logits_are_refused(plain_model: Model) -> None:
    with pytest.raises(jm.UserError, match="Did you mean 'last'"):
        jm.forward(plain_model, np.arange(6), logits="lasst")
