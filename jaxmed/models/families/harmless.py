"""Keys of published config.json files that do not change what a forward pass computes, and keys that do not while they are off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INERT = frozenset(
    (
        "architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path bos_token_id eos_token_id "
        "pad_token_id initializer_range use_cache attention_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp "
        "is_llama_config output_attentions output_hidden_states return_dict unsloth_fixed unsloth_version torchscript "
        "transformers.js_config task_specific_params output_router_logits router_aux_loss_coef router_jitter_noise auto_map "
        "cache_implementation chunk_size_feed_forward id2label label2id problem_type _attn_implementation_autoset "
        "_attn_implementation use_bfloat16 summary_type summary_use_proj summary_activation summary_proj_to_labels "
        "summary_first_dropout n_ctx gradient_checkpointing hidden_dropout interpolate_factor sep_token_id tf_legacy_loss "
        "embedding_dropout n_special predict_special_tokens max_sequence_length Config keys that do not change what a forward "
        "pass computes. _num_labels num_labels output_past finetuning_task prefix tokenizer_class is_decoder unk_token_id "
        "mask_token_id _commit_hash model_max_length tokenizer_model_max_length tokenizer_padding_side attn_implementation "
        "_attn_implementation_internal _flash_attn_2_enabled use_flash_attn use_flash_attention use_flash_attention_2 use_sdpa "
        "use_memory_efficient_attention neftune_noise_alpha low_cpu_mem_usage loss_type is_composition for_llm_compressor "
        "trust_remote_code attention_probs_dropout_prob hidden_dropout_prob classifier_dropout base_model_name_or_path "
        "max_window_layers logits_to_keep num_logits_to_keep"
    ).split()
)
"""Of training, of the library, of heads for other tasks, of kernels that compute the same."""

GENERATION = frozenset(
    (
        "assistant_confidence_threshold assistant_early_exit assistant_lookbehind bad_words_ids begin_suppress_tokens "
        "constraints decoder_start_token_id diversity_penalty do_sample dola_layers early_stopping encoder_no_repeat_ngram_size "
        "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids "
        "forced_bos_token_id forced_eos_token_id guidance_scale length_penalty low_memory max_length max_matching_ngram_size "
        "max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens "
        "num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits output_scores penalty_alpha "
        "prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate "
        "sequence_bias stop_strings suppress_tokens temperature token_healing top_k top_p typical_p watermarking_config"
    ).split()
)
"""How texts are written, which older versions of `transformers` kept in config.json."""

NO = (False,)
OFF: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys("attention_bias mlp_bias lm_head_bias qkv_bias bias use_bias add_cross_attention is_encoder_decoder".split(), NO),
    **dict.fromkeys("tie_encoder_decoder use_sliding_window use_mrope rope_interleaved use_bidirectional_attention".split(), NO),
    **dict.fromkeys("use_qk_norm qk_norm qk_layernorm alibi use_alibi parallel_attn use_parallel_residual attn_output_gate".split(), NO),
    **dict.fromkeys("embedding_multiplier residual_multiplier logits_scaling logit_scale".split(), (1,)),
    "pruned_heads": ({}, []),
    "num_experts": (0, 1),
    "partial_rotary_factor": (1,),
}
"""Key -> the values with which a family that does not know it computes what it says; null is one for every key."""


def is_harmless(key: str, raw: Mapping[str, Any]) -> bool:
    """Whether a key that a family does not use may stand in its config."""
    value = raw[key]
    if value is None or key in INERT or key in GENERATION:
        return True
    if key == "layer_types":
        return not raw.get("sliding_window") and isinstance(value, list) and set(map(str, value)) == {"full_attention"}
    return key in OFF and value in OFF[key]
