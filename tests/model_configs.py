"""Random small configs of every architecture: each call varies the keys that change parameters or spans."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Config = dict[str, Any]
Make = Callable[[random.Random], Config]


def some(r: random.Random, **choices: list[Any]) -> Config:
    """For about half of the keys one of its choices; the others are left to the class."""
    return {key: r.choice(values) for key, values in choices.items() if r.random() < 0.6}


FLAG = [True, False]


def dims(r: random.Random, **more: Any) -> Config:
    heads = r.choice([2, 4, 8])
    return {
        "hidden_size": heads * r.choice([8, 16]),
        "num_hidden_layers": r.randint(1, 9),
        "num_attention_heads": heads,
        "num_key_value_heads": r.choice([n for n in (1, 2, 4, 8) if heads % n == 0]),
        "intermediate_size": r.choice([24, 40, 64]),
        "vocab_size": r.choice([97, 128, 301]),
        **more,
    }


def llama(r: random.Random) -> Config:
    return dims(r) | some(
        r, attention_bias=FLAG, mlp_bias=FLAG, tie_word_embeddings=FLAG, head_dim=[8, 24],
        max_position_embeddings=[64, 4096],
    )  # fmt: skip


def tied(r: random.Random) -> Config:
    return dims(r) | some(r, attention_bias=FLAG, tie_word_embeddings=FLAG)


def layered(r: random.Random, kinds: list[str], config: Config) -> Config:
    """Sometimes with a list of layer types instead of the class's rule."""
    if r.random() < 0.4:
        config["layer_types"] = [r.choice(kinds) for _ in range(config["num_hidden_layers"])]
    return config


WINDOWS = ["full_attention", "sliding_attention"]
LINEARS = ["full_attention", "linear_attention"]


def windowed(r: random.Random) -> Config:
    config = tied(r) | some(r, sliding_window=[4, 16, 4096], head_dim=[8, 24])
    return layered(r, WINDOWS, config)


def gemma(r: random.Random) -> Config:
    return tied(r) | some(r, head_dim=[8, 24])


def cohere(r: random.Random) -> Config:
    return tied(r) | some(r, use_qk_norm=FLAG)


def mistral(r: random.Random) -> Config:
    return dims(r) | some(r, tie_word_embeddings=FLAG, head_dim=[8, 24], sliding_window=[4, None])


def ministral(r: random.Random) -> Config:
    return layered(r, WINDOWS, mistral(r) | {"head_dim": r.choice([8, 24])})


def qwen2(r: random.Random) -> Config:
    return layered(r, ["full_attention"], dims(r)) | some(
        r, tie_word_embeddings=FLAG, use_sliding_window=FLAG, sliding_window=[16], max_window_layers=[0, 2, 5]
    )


def qwen3(r: random.Random) -> Config:
    return qwen2(r) | some(r, attention_bias=FLAG, head_dim=[8, 24])


def smollm3(r: random.Random) -> Config:
    config = (
        llama(r)
        | {"pad_token_id": 0}
        | some(r, no_rope_layer_interval=[2, 4], use_sliding_window=FLAG, sliding_window=[8, None])
    )
    config.pop("head_dim", None)
    return config


def moe(r: random.Random, **more: Any) -> Config:
    experts = r.choice([4, 8])
    return {"num_experts_per_tok": r.choice([1, 2, 3]), **more, "num_local_experts": experts}


def mixtral(r: random.Random) -> Config:
    return dims(r) | moe(r) | some(r, tie_word_embeddings=FLAG, head_dim=[8, None], sliding_window=[8, None])


def minimax(r: random.Random) -> Config:
    return layered(r, LINEARS, mixtral(r) | some(r, block_size=[16, 64]))


def minimax_m2(r: random.Random) -> Config:
    return dims(r) | moe(r) | some(r, tie_word_embeddings=FLAG, head_dim=[8, 24])


def phimoe(r: random.Random) -> Config:
    return (
        dims(r)
        | moe(r)
        | some(r, attention_bias=FLAG, lm_head_bias=FLAG, tie_word_embeddings=FLAG, sliding_window=[8, None])
    )


def olmoe(r: random.Random) -> Config:
    routed = moe(r)
    routed["num_experts"] = routed.pop("num_local_experts")
    return tied(r) | routed


def gpt_oss(r: random.Random) -> Config:
    return layered(r, WINDOWS, tied(r) | moe(r) | some(r, head_dim=[8, 24], sliding_window=[4, 64]))


def llama4(r: random.Random) -> Config:
    config = tied(r) | moe(r, num_experts_per_tok=1) | some(
        r, intermediate_size_mlp=[32, 80], head_dim=[8, 24], interleave_moe_layer_step=[1, 2, 3],
        use_qk_norm=FLAG, attention_chunk_size=[8, 64], no_rope_layer_interval=[2, 4],
    )  # fmt: skip
    if r.random() < 0.3:
        layers = range(config["num_hidden_layers"])
        config["moe_layers"] = sorted(r.sample(layers, r.randint(0, len(layers))))
    return config


def qwen_experts(r: random.Random) -> Config:
    experts = {"num_experts": r.choice([4, 8]), "num_experts_per_tok": r.choice([1, 2, 4])}
    return experts | some(r, moe_intermediate_size=[16, 40], decoder_sparse_step=[1, 2])


def sparse(r: random.Random, config: Config) -> Config:
    """Sometimes with some layers listed as dense."""
    if r.random() < 0.5:
        config["mlp_only_layers"] = sorted({r.randrange(config["num_hidden_layers"]) for _ in range(2)})
    return config


def qwen2_moe(r: random.Random) -> Config:
    return sparse(r, dims(r) | qwen_experts(r)) | some(
        r, qkv_bias=FLAG, shared_expert_intermediate_size=[16, 48], tie_word_embeddings=FLAG,
        use_sliding_window=FLAG, sliding_window=[8], max_window_layers=[0, 3, 28],
    )  # fmt: skip


def qwen3_moe(r: random.Random) -> Config:
    config = sparse(r, tied(r) | qwen_experts(r)) | some(r, head_dim=[8, 24])
    config["num_local_experts"] = config.pop("num_experts")
    return config


def delta(r: random.Random) -> Config:
    config = layered(r, LINEARS, tied(r) | some(r, head_dim=[8, 24], full_attention_interval=[2, 3]))
    return config | some(
        r, linear_conv_kernel_dim=[2, 4], linear_key_head_dim=[8, 16], linear_value_head_dim=[8, 16]
    ) | r.choice([{}, {"linear_num_key_heads": 2, "linear_num_value_heads": 6}])  # fmt: skip


def delta_moe(r: random.Random) -> Config:
    routed = qwen_experts(r)
    routed.pop("decoder_sparse_step", None)
    return delta(r) | routed | some(r, shared_expert_intermediate_size=[16, 48])


def qwen3_next(r: random.Random) -> Config:
    return sparse(r, delta_moe(r) | some(r, decoder_sparse_step=[1, 2]))


def glm4_moe(r: random.Random) -> Config:
    routed = moe(r)
    routed["n_routed_experts"] = routed.pop("num_local_experts")
    return tied(r) | routed | some(
        r, moe_intermediate_size=[16, 40], n_shared_experts=[1, 2], first_k_dense_replace=[0, 1, 3],
        use_qk_norm=FLAG, head_dim=[8, 24],
    )  # fmt: skip


def latent(r: random.Random) -> Config:
    config = glm4_moe(r) | some(
        r, q_lora_rank=[16, 24], kv_lora_rank=[16, 32], qk_nope_head_dim=[8, 16],
        qk_rope_head_dim=[4, 8], v_head_dim=[8, 16],
    )  # fmt: skip
    for key in ("use_qk_norm", "head_dim"):
        config.pop(key, None)
    config["num_key_value_heads"] = config["num_attention_heads"]
    return config


def deepseek(r: random.Random) -> Config:
    config = latent(r)
    if r.random() < 0.4:
        config["q_lora_rank"] = None
    return config


def deepseek_v2(r: random.Random) -> Config:
    return deepseek(r) | some(r, mlp_bias=FLAG)


def indexed(r: random.Random) -> Config:
    config = latent(r) | some(r, index_topk=[4, 64], index_head_dim=[16, 32], index_n_heads=[2, 4])
    if r.random() < 0.3:
        kinds = ["dense", "sparse"]
        config["mlp_layer_types"] = [r.choice(kinds) for _ in range(config["num_hidden_layers"])]
    return config


def glm_dsa(r: random.Random) -> Config:
    config = indexed(r) | some(r, index_topk_freq=[1, 2, 4], index_skip_topk_offset=[1, 2, 3])
    if r.random() < 0.3:
        shared = ["full", "shared"]
        config["indexer_types"] = [
            "full",
            *(r.choice(shared) for _ in range(config["num_hidden_layers"] - 1)),
        ]
    return config


def phi(r: random.Random) -> Config:
    return dims(r) | some(r, qk_layernorm=FLAG, tie_word_embeddings=FLAG)


def phi3(r: random.Random) -> Config:
    return dims(r, pad_token_id=0) | some(r, tie_word_embeddings=FLAG, sliding_window=[8, None])


def nemotron(r: random.Random) -> Config:
    return llama(r)


def starcoder2(r: random.Random) -> Config:
    return dims(r) | some(r, use_bias=FLAG, tie_word_embeddings=FLAG, sliding_window=[8, None])


def stablelm(r: random.Random) -> Config:
    return dims(r) | some(
        r, use_qkv_bias=FLAG, qk_layernorm=FLAG, use_parallel_residual=FLAG, tie_word_embeddings=FLAG
    )


def glm(r: random.Random) -> Config:
    return dims(r, pad_token_id=0) | some(r, attention_bias=FLAG, head_dim=[8, 24], tie_word_embeddings=FLAG)


def gpt2(r: random.Random) -> Config:
    heads = r.choice([2, 4])
    return {
        "n_embd": heads * 8, "n_layer": r.randint(1, 5), "n_head": heads, "vocab_size": r.choice([97, 256])
    } | some(r, n_inner=[24, None], n_positions=[64, 100], tie_word_embeddings=FLAG)  # fmt: skip


def gptj(r: random.Random) -> Config:
    return gpt2(r) | {"rotary_dim": 4}


def gpt_neo(r: random.Random) -> Config:
    layers = 2 * r.randint(1, 4)
    return {
        "hidden_size": 32, "num_layers": layers, "num_heads": r.choice([2, 4]), "vocab_size": 97,
        "attention_types": r.choice([[[["global", "local"], layers // 2]], [[["global"], layers]]]),
    } | some(
        r, intermediate_size=[24, None], window_size=[8, 256], tie_word_embeddings=FLAG,
        max_position_embeddings=[64, 128],
    )  # fmt: skip


def gpt_neox(r: random.Random) -> Config:
    config = dims(r) | some(r, attention_bias=FLAG, use_parallel_residual=FLAG, tie_word_embeddings=FLAG)
    del config["num_key_value_heads"]
    return config


def opt(r: random.Random) -> Config:
    heads = r.choice([2, 4])
    return {
        "hidden_size": heads * 8, "num_hidden_layers": r.randint(1, 5), "num_attention_heads": heads,
        "ffn_dim": 24, "vocab_size": 97, "word_embed_proj_dim": r.choice([heads * 8, 12]),
    } | some(
        r, do_layer_norm_before=FLAG, _remove_final_layer_norm=FLAG, enable_bias=FLAG,
        layer_norm_elementwise_affine=FLAG, max_position_embeddings=[64, 100], tie_word_embeddings=FLAG,
    )  # fmt: skip


def bloom(r: random.Random) -> Config:
    return {
        "hidden_size": 32, "n_layer": r.randint(1, 5), "n_head": r.choice([2, 4]), "vocab_size": 97
    } | some(r, tie_word_embeddings=FLAG)  # fmt: skip


def falcon(r: random.Random) -> Config:
    heads = r.choice([2, 4, 8])
    return {
        "hidden_size": heads * 8, "num_hidden_layers": r.randint(1, 5), "num_attention_heads": heads,
        "vocab_size": 97,
    } | some(
        r, new_decoder_architecture=FLAG, multi_query=FLAG, parallel_attn=FLAG, bias=FLAG, alibi=FLAG,
        num_kv_heads=[1, 2, None], ffn_hidden_size=[24, None], num_ln_in_parallel_attn=[1, 2, None],
        tie_word_embeddings=FLAG,
    )  # fmt: skip


def mpt(r: random.Random) -> Config:
    return {
        "d_model": 32, "n_layers": r.randint(1, 5), "n_heads": r.choice([2, 4]), "vocab_size": 97
    } | some(r, tie_word_embeddings=FLAG, max_seq_len=[64, 512])  # fmt: skip


def dbrx(r: random.Random) -> Config:
    heads = r.choice([2, 4])
    return {
        "d_model": heads * 8, "n_layers": r.randint(1, 5), "n_heads": heads, "vocab_size": 97,
        "attn_config": some(r, kv_n_heads=[1, 2], clip_qkv=[8]) | {"rope_theta": 10_000.0},
        "ffn_config": some(r, ffn_hidden_size=[24, 40], moe_num_experts=[4, 8], moe_top_k=[1, 2]),
    }  # fmt: skip


def bert(r: random.Random) -> Config:
    config = dims(r) | some(r, type_vocab_size=[1, 2, 3], max_position_embeddings=[64, 514])
    del config["num_key_value_heads"]
    return config


def t5(r: random.Random) -> Config:
    return {
        "d_model": 32, "num_layers": r.randint(1, 4), "num_heads": r.choice([2, 4]), "d_ff": 40,
        "vocab_size": 97,
    } | some(
        r, d_kv=[8, 12], num_decoder_layers=[1, 2, 5], relative_attention_num_buckets=[8, 32],
        feed_forward_proj=["relu", "gated-gelu", "gelu", "gated-silu"], tie_word_embeddings=FLAG,
    )  # fmt: skip


def nemotron_h(r: random.Random) -> Config:
    kinds = ["linear_attention", "moe", "full_attention", "mlp"]
    layers = [r.choice(kinds) for _ in range(r.randint(1, 8))]
    config = dims(r) | {"layers_block_type": layers, "mamba_num_heads": 8, "n_groups": r.choice([1, 2, 4])}
    del config["num_hidden_layers"]
    return config | some(
        r, head_dim=[8, 24], mamba_head_dim=[8, 16], ssm_state_size=[8, 16], conv_kernel=[2, 4],
        use_conv_bias=FLAG, use_bias=FLAG, mlp_bias=FLAG, moe_latent_size=[12, None],
        moe_intermediate_size=[16, 40], moe_shared_expert_intermediate_size=[16, 40],
        n_routed_experts=[4, 8], num_experts_per_tok=[1, 2], chunk_size=[16, 64],
    )  # fmt: skip


def granitemoe(r: random.Random) -> Config:
    return tied(r) | moe(r)


def mimo(r: random.Random) -> Config:
    config = glm4_moe(r) | {"num_key_value_heads": 1} | some(r, v_head_dim=[8, 12], sliding_window=[4, 64])
    for key in ("n_shared_experts", "first_k_dense_replace", "use_qk_norm"):
        config.pop(key, None)
    if r.random() < 0.3:
        config["mlp_layer_types"] = [
            r.choice(["dense", "sparse"]) for _ in range(config["num_hidden_layers"])
        ]
    return layered(r, WINDOWS, config)


def gpt_bigcode(r: random.Random) -> Config:
    return gpt2(r) | some(r, multi_query=FLAG)


def seed_oss(r: random.Random) -> Config:
    return llama(r) | some(r, attention_out_bias=FLAG)


def ernie(r: random.Random) -> Config:
    return dims(r) | some(r, use_bias=FLAG, head_dim=[8, 24], tie_word_embeddings=FLAG)


def mamba2(r: random.Random) -> Config:
    return {
        "hidden_size": 32, "num_heads": 8, "head_dim": 8, "vocab_size": 97, "expand": 2,
        "num_hidden_layers": r.randint(1, 5), "n_groups": r.choice([1, 2, 4]),
    } | some(
        r, state_size=[8, 16], conv_kernel=[2, 4], use_bias=FLAG, use_conv_bias=FLAG, chunk_size=[16, 64],
        tie_word_embeddings=FLAG,
    )  # fmt: skip


MAKERS: dict[str, Make] = {
    "llama": llama,
    "granite": llama,
    "smollm3": smollm3,
    "mistral": mistral,
    "ministral": ministral,
    "ministral3": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_5_text": delta,
    "gemma": gemma,
    "gemma2": windowed,
    "gemma3_text": windowed,
    "phi": phi,
    "phi3": phi3,
    "olmo": tied,
    "olmo2": tied,
    "olmo3": windowed,
    "cohere": cohere,
    "cohere2": windowed,
    "nemotron": nemotron,
    "starcoder2": starcoder2,
    "stablelm": stablelm,
    "glm": glm,
    "mixtral": mixtral,
    "minimax": minimax,
    "minimax_m2": minimax_m2,
    "phimoe": phimoe,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "llama4_text": llama4,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "qwen3_5_moe_text": delta_moe,
    "glm4_moe": glm4_moe,
    "mimo_v2_flash": mimo,
    "dbrx": dbrx,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek,
    "deepseek_v32": indexed,
    "glm_moe_dsa": glm_dsa,
    "nemotron_h": nemotron_h,
    "gpt2": gpt2,
    "gptj": gptj,
    "gpt_neo": gpt_neo,
    "gpt_neox": gpt_neox,
    "opt": opt,
    "bloom": bloom,
    "falcon": falcon,
    "mpt": mpt,
    "bert": bert,
    "roberta": bert,
    "t5": t5,
    "glm4": glm,
    "seed_oss": seed_oss,
    "arcee": llama,
    "ernie4_5": ernie,
    "granitemoe": granitemoe,
    "gpt_bigcode": gpt_bigcode,
    "codegen": gptj,
    "mamba2": mamba2,
}
"""The maker of every architecture that transformers builds alone."""

TWINS: dict[str, Make] = {"xlm-roberta": bert, "mt5": t5}
"""Architectures that another one's code builds."""
