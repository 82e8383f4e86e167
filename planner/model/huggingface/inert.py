"""Keys of a config.json beside a family's own: what says nothing, what is noted, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_INERT = """
    _name_or_path architectures dtype torch_dtype transformers_version use_cache output_past bos_token_id
    eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    model_type pretraining_tp output_attentions output_hidden_states return_dict return_dict_in_generate
    id2label label2id task_specific_params tokenizer_class prefix finetuning_task problem_type max_length
    min_length do_sample temperature top_k top_p typical_p num_beams num_beam_groups num_return_sequences
    length_penalty repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    early_stopping diversity_penalty exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens remove_invalid_values forced_bos_token_id forced_eos_token_id output_scores
    chunk_size_feed_forward is_decoder torchscript tf_legacy_loss use_bfloat16 summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    gradient_checkpointing rope_interleaved rope_interleave _attn_implementation
    _attn_implementation_autoset attn_implementation use_flash_attn n_ctx classifier_dropout num_labels
    position_embedding_type hidden_activation partial_rotary_factor rotary_pct scale_attn_weights
    scale_attn_by_inverse_layer_idx reorder_and_upcast_attn clip_qkv clip_qkv_value router_aux_loss_coef
    output_router_logits router_jitter_noise router_z_loss_coef router_bias_update_rate aux_loss_alpha
    seq_aux norm_topk_prob routed_scaling_factor scoring_func topk_method n_group topk_group ep_size
    num_mtp_layers mtp_use_dedicated_embeddings mtp_layers_block_type mtp_hybrid_override_pattern
    mtp_layer_types mtp_transformer_layers use_mtp attn_output_gate rope_theta_local residual_in_fp32
    time_step_min time_step_max time_step_limit time_step_floor time_step_rank use_mamba_kernels
    mamba_ssm_cache_dtype mamba_ssm_dtype mamba_hidden_act mamba_proj_bias moe_shared_expert_overlap
    num_logits_to_keep rescale_prenorm_residual use_routing_bias shared_intermediate_size image_token_id
    video_token_id vision_start_token_id vision_end_token_id vision_token_id image_token_index
    indexer_rope_interleave unsloth_fixed unsloth_version rope_parameters rope_scaling
    max_sequence_length
    """

INERT = frozenset(_INERT.split())
"""Keys that say nothing about what a training step costs."""

_WITHOUT_MTP = "without multi-token prediction, of which the config has {value}"

NOTED: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "quantization_config": (
            None,
            "published with quantised weights (quantization_config); training starts from dequantised ones",
        ),
        "num_nextn_predict_layers": (0, _WITHOUT_MTP),
        "num_mtp_modules": (0, _WITHOUT_MTP),
        "mtp_num_hidden_layers": (0, _WITHOUT_MTP),
    }
    | {
        key: (0, f"not described: {key} = {{value}}")
        for key in (
            "attention_dropout",
            "hidden_dropout",
            "dropout",
            "dropout_rate",
            "resid_pdrop",
            "embd_pdrop",
            "emb_pdrop",
            "attn_pdrop",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "residual_dropout",
            "embedding_dropout",
            "resid_dropout",
            "embed_dropout",
        )
    }
)
"""Keys that the ModelSpec does not hold but that are not hidden: the value that means nothing; the note."""

CHANGES_COST: Mapping[str, str] = MappingProxyType(
    {
        "num_local_experts": "experts are not part of this family",
        "num_experts": "experts are not part of this family",
        "n_routed_experts": "experts are not part of this family",
        "pruned_heads": "its heads were pruned",
        "add_cross_attention": "cross attention is not modelled",
        "is_encoder_decoder": "an encoder is not modelled",
        "text_config": "holds a model inside a model",
        "vision_config": "a vision tower is not modelled",
        "audio_config": "an audio tower is not modelled",
        "sliding_window": "sliding-window attention is not modelled for this family",
        "attention_chunk_size": "chunked attention is not modelled for this family",
        "kv_lora_rank": "latent attention is not part of this family",
        "index_topk": "attention to chosen keys is not part of this family",
    }
)
"""Keys that would change the cost where a family does not read them: any value but null, false, 0 and
empty is refused, with the reason.
"""

CODE_KEYS = ("auto_map", "trust_remote_code")
"""Keys by which a config asks for its own code to be run."""
