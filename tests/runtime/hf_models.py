"""Tiny random models of transformers: one for each family, and for each variant that computes otherwise."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
QUIET: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
WINDOWED: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_MULTI = {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
_NEO = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 5,
}
_OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "llama-scaled": {**SIZES, "rope_parameters": LLAMA3},
    "llama-linear": {
        **SIZES,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        "tie_word_embeddings": True,
    },
    "llama-yarn": {**SIZES, "rope_parameters": YARN},
    "mistral": {**SIZES, "sliding_window": 6},
    "ministral": {**SIZES, **WINDOWED, "head_dim": 8},
    "qwen2": {**SIZES, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**SIZES, "head_dim": 12},
    "gemma": {**SIZES, "head_dim": 12},
    "gemma2": {**SIZES, "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20},
    "gemma3_text": {**SIZES, **WINDOWED, "head_dim": 12, "query_pre_attn_scalar": 20},
    "granite": {
        **SIZES,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
    "arcee": SIZES,
    "seed_oss": {**SIZES, "head_dim": 8},
    "ernie4_5": {**SIZES, "head_dim": 8, "use_bias": True},
    "smollm3": {**SIZES, "no_rope_layer_interval": 2},
    "phi": {**SIZES, "qk_layernorm": True},
    "phi3": {**SIZES, "sliding_window": 6},
    "olmo": SIZES,
    "olmo2": SIZES,
    "olmo3": {**SIZES, **WINDOWED, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
    "cohere": {**SIZES, "logit_scale": 0.5},
    "cohere2": {**SIZES, **WINDOWED, "logit_scale": 0.5},
    "nemotron": {**SIZES, "head_dim": 8},
    "starcoder2": {**SIZES, "sliding_window": 6},
    "stablelm": SIZES,
    "stablelm-parallel": {**SIZES, "use_parallel_residual": True, "use_qkv_bias": True},
    "glm": {**SIZES, "head_dim": 8},
    "glm4": {**SIZES, "head_dim": 8},
    "gpt2": _GPT2,
    "gpt_neo": _NEO,
    "gpt_neox": {**SIZES, "rotary_pct": 0.5},
    "gpt_neox-serial": {**SIZES, "use_parallel_residual": False},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "opt": _OPT,
    "falcon": {**SIZES, "alibi": False},
    "falcon-new": {**SIZES, **_MULTI},
    "falcon-serial": {**SIZES, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": False},
    "deepseek_v2": {**SIZES, **LATENT, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    "deepseek_v3": {**SIZES, **LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "qwen2_moe": {**SIZES, **_MOE, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_moe": {**SIZES, **_MOE, "head_dim": 12, "norm_topk_prob": True},
    "olmoe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**SIZES, **GROUPED, "head_dim": 8, "use_qk_norm": True},
    "deepseek_v2-groups": {
        **SIZES,
        **LATENT,
        **GROUPED,
        "num_key_value_heads": 4,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 2.0,
    },
    "deepseek_v3-groups": {**SIZES, **LATENT, **GROUPED, "num_key_value_heads": 4},
    "deepseek_v3-direct": {**SIZES, **LATENT, "q_lora_rank": None},
}
"""Keys of each config; a name is its model_type, and what is special behind a dash."""


def make_model(name: str, **keys: Any) -> Any:
    """The model of transformers with random weights: norms and biases too, so that none may be forgotten."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name.split("-")[0], **{**QUIET, **CONFIGS[name], **keys})
    generator = torch.Generator().manual_seed(11)
    make: Any = AutoModelForCausalLM.from_config
    model = make(config, attn_implementation="eager").eval()
    with torch.no_grad():
        corrections = [b for key, b in model.named_buffers() if key.endswith("correction_bias")]
        for parameter in (*model.parameters(), *corrections):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (parameter.dim() == 1) + 0.15 * noise)
    return model
