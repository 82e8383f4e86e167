"""Traps of config.json by family: fused, missing, renamed keys, class defaults, spans, nested text models."""

from __future__ import annotations

from typing import Any

import pytest

from planner.foundation.errors import InputError
from planner.hardware.catalog import load_model
from planner.model.attention import CAUSAL, Attention, AttentionSpan, LatentAttention, QkNorm, Reach
from planner.model.feed_forward import Activation, Experts, Mlp
from planner.model.huggingface import FAMILIES, WRAPPERS, read_config
from planner.model.mixers import DeltaNet, LightningAttention, StateSpace
from planner.model.spec import Block, ModelSpec, Norm

DIMS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 128,
}
ABSENT: Any = object()
ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_routed_experts": 8}


def read(model_type: str, **keys: Any) -> ModelSpec:
    """A small model with `keys`; ABSENT leaves a key out."""
    config = {"model_type": model_type, **DIMS, **keys}
    told = {key: value for key, value in config.items() if value is not ABSENT}
    return read_config(told, source="c", name="x")


def first(model: ModelSpec) -> Block:
    block = model.block(0)
    assert isinstance(block, Block)
    return block


def attention(model: ModelSpec, layer: int = 0) -> Attention:
    block = model.block(layer)
    assert isinstance(block, Block) and isinstance(block.mixer, Attention)
    return block.mixer


def faults(model_type: str, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(model_type, **keys)
    return str(caught.value)


def test_every_wrapper_holds_a_family() -> None:
    assert set(WRAPPERS.values()) <= set(FAMILIES)
    assert not set(WRAPPERS) & set(FAMILIES)


def test_biases_that_no_key_mentions() -> None:
    qwen2 = attention(read("qwen2"))
    assert qwen2.qkv_bias and not qwen2.out_bias
    assert not attention(read("qwen3")).qkv_bias
    gptj = read_config(
        {"model_type": "gptj", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
        source="c",
        name="x",
    )
    assert gptj.head_bias and not attention(gptj).qkv_bias
    neo = {"model_type": "gpt_neo", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    assert attention(read_config(neo, source="c", name="x")).out_bias
    assert read("phi").head_bias and attention(read("phi")).out_bias


@pytest.mark.parametrize(
    "model_type", ["gemma", "gemma2", "gemma3_text", "smollm3", "cohere", "cohere2", "starcoder2", "opt"]
)
def test_embeddings_are_tied_where_the_class_ties_them(model_type: str) -> None:
    keys = {"ffn_dim": 96} if model_type == "opt" else {}
    assert read(model_type, **keys).tied_embeddings
    assert not read(model_type, **keys, tie_word_embeddings=False).tied_embeddings


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi", "phi3", "olmo2", "nemotron"]
)
def test_embeddings_are_not_tied_where_the_class_does_not(model_type: str) -> None:
    assert not read(model_type).tied_embeddings
    assert read(model_type, tie_word_embeddings=True).tied_embeddings


def test_a_head_may_be_wider_than_its_share_of_the_hidden_size() -> None:
    assert attention(read("gemma")).head_dim == 256
    assert attention(read("qwen3")).head_dim == 128
    assert attention(load_model("mistral-nemo-12b")).head_dim == 128
    assert attention(load_model("gpt-oss-120b")).head_dim == 64
    assert attention(read("mistral", head_dim=None)).head_dim == 8


def test_null_means_derived_and_absence_means_the_class_default() -> None:
    assert attention(read("gemma2", num_key_value_heads=ABSENT)).kv_heads == 4
    assert attention(read("mixtral", num_attention_heads=16, num_key_value_heads=ABSENT)).kv_heads == 8
    assert attention(read("mixtral", num_attention_heads=16, num_key_value_heads=None)).kv_heads == 16
    assert "the class's default" in faults("qwen2", num_key_value_heads=ABSENT)
    assert attention(read("mistral")).span == AttentionSpan(reach=Reach.WINDOW, size=4096)
    assert attention(read("mistral", sliding_window=None)).span == CAUSAL


def falcon(**keys: Any) -> ModelSpec:
    dims = {key: value for key, value in DIMS.items() if key != "intermediate_size"}
    return read_config({"model_type": "falcon", **dims, **keys}, source="c", name="x")


def test_falcon_has_one_key_head_unless_its_architecture_is_new() -> None:
    assert attention(falcon(num_kv_heads=8)).kv_heads == 1
    assert attention(falcon(num_kv_heads=2, multi_query=False)).kv_heads == 8
    new = falcon(num_kv_heads=2, new_decoder_architecture=True)
    assert attention(new).kv_heads == 2 and first(new).norms == 2
    assert first(falcon()).norms == 1 and first(falcon()).parallel
    assert first(falcon(parallel_attn=False)).norms == 2
    assert isinstance(first(falcon()).mlp, Mlp) and first(falcon()).mlp.width == 256


def test_widths_that_no_key_gives_are_four_times_the_hidden_size() -> None:
    for name in ("bloom-176b", "mpt-30b", "falcon-7b", "gpt-j-6b"):
        model = load_model(name)
        assert isinstance(first(model).mlp, Mlp) and first(model).mlp.width == 4 * model.hidden


def test_opt_has_two_more_positions_and_may_project_its_embedding() -> None:
    model = load_model("opt-350m")
    assert model.learned_positions == 2050 and model.max_positions == 2048
    assert model.embedding_width == 512 and model.final_norms == 0
    assert load_model("opt-13b").embedding_width is None and load_model("opt-13b").final_norms == 1


def test_tables_and_norms_beside_the_token_embedding() -> None:
    bloom, bert, roberta = load_model("bloom-3b"), load_model("bert"), load_model("roberta")
    assert bloom.embedding_norm and bloom.learned_positions == 0
    assert bert.embedding_norm and bert.token_types == 2 and bert.pooler and bert.final_norms == 0
    assert roberta.learned_positions == 514 and roberta.max_positions == 512
    assert attention(bert).span.reach is Reach.ALL


def test_norms_of_every_kind() -> None:
    assert first(read("gemma2")).norms == 4
    assert read("olmo").norm is Norm.LAYERNORM_WITHOUT_PARAMETERS
    assert load_model("dbrx").norm is Norm.LAYERNORM_WITHOUT_BIAS
    assert first(read("cohere")).norms == 1 and first(read("cohere")).parallel
    assert first(read("gpt_neox")).norms == 2 and first(read("gpt_neox")).parallel
    assert first(read("stablelm", use_parallel_residual=True)).norms == 1
    assert attention(read("olmo2")).qk_norm is QkNorm.WIDTH
    assert attention(read("qwen3")).qk_norm is QkNorm.HEAD
    assert attention(read("phi", qk_layernorm=True)).qk_norm is QkNorm.HEAD_LAYERNORM
    assert attention(read("cohere")).qk_norm is QkNorm.NONE


def test_dense_layers_come_before_sparse_ones() -> None:
    model = read("deepseek_v3", **ROUTED, first_k_dense_replace=3, n_shared_experts=2)
    dense, sparse = model.segments
    assert (dense.count, sparse.count) == (3, 1)
    assert isinstance(dense.block.mlp, Mlp) and dense.block.mlp.width == 96
    assert isinstance(sparse.block.mlp, Experts) and sparse.block.mlp.shared is not None
    assert sparse.block.mlp.shared.width == 48 and sparse.block.mlp.expert.width == 24


def test_sparse_layers_by_step_and_by_list() -> None:
    keys = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    steps = read("qwen3_moe", **keys, decoder_sparse_step=2)
    assert [isinstance(block.mlp, Experts) for block in steps.blocks()] == [False, True, False, True]
    listed = read("qwen2_moe", **keys, mlp_only_layers=[0, 3], shared_expert_intermediate_size=40)
    assert [isinstance(block.mlp, Experts) for block in listed.blocks()] == [False, True, True, False]
    moe = listed.block(1).mlp
    assert moe.shared is not None and moe.shared.width == 40 and moe.shared_gate
    llama4 = {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 192}
    maverick = read("llama4_text", **llama4, interleave_moe_layer_step=2)
    assert [isinstance(block.mlp, Experts) for block in maverick.blocks()] == [False, True, False, True]
    assert maverick.block(0).mlp.width == 192 and maverick.block(1).mlp.expert.width == 96
    assert isinstance(read("llama4_text", **llama4, moe_layers=[0]).block(1).mlp, Mlp)


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("mixtral", "num_local_experts"),
        ("mixtral", "num_experts"),
        ("qwen3_moe", "num_experts"),
        ("qwen3_moe", "num_local_experts"),
        ("olmoe", "num_experts"),
        ("deepseek_v3", "n_routed_experts"),
        ("glm4_moe", "n_routed_experts"),
        ("minimax_m2", "num_local_experts"),
    ],
)
def test_the_number_of_experts_has_many_names(model_type: str, key: str) -> None:
    model = read(model_type, **{key: 12, "num_experts_per_tok": 3}, head_dim=8, num_hidden_layers=5)
    block = model.block(4)
    assert isinstance(block.mlp, Experts)
    assert (block.mlp.count, block.mlp.topk) == (12, 3)


def test_latent_attention_with_and_without_a_query_rank() -> None:
    without = first(read("deepseek_v2", **ROUTED, q_lora_rank=None)).mixer
    assert isinstance(without, LatentAttention) and without.query_rank is None
    default = first(read("deepseek_v2", **ROUTED)).mixer
    assert isinstance(default, LatentAttention) and default.query_rank == 1536
    chosen = first(read("deepseek_v32", **ROUTED)).mixer
    assert isinstance(chosen, LatentAttention) and chosen.span == AttentionSpan(reach=Reach.CHOSEN, size=2048)
    assert chosen.indexer is not None
    shared = read("glm_moe_dsa", **ROUTED, indexer_types=["full", "shared", "shared", "full"])
    assert [block.mixer.indexer is not None for block in shared.blocks()] == [True, False, False, True]
    pattern = read("glm_moe_dsa", **ROUTED, index_topk_pattern="FSSF")
    assert pattern.params_total == shared.params_total


def t5(**keys: Any) -> ModelSpec:
    dims = {"d_model": 64, "num_layers": 3, "num_heads": 4, "d_ff": 96, "vocab_size": 128}
    return read_config({"model_type": "t5", **dims, **keys}, source="c", name="x")


def test_t5_is_an_encoder_and_its_decoder() -> None:
    model = t5(num_decoder_layers=2)
    assert model.encoder_layers == 3 and model.layers == 5 and model.final_norms == 2
    assert attention(model).position_buckets == 32 and attention(model, 1).position_buckets == 0
    assert attention(model, 3).position_buckets == 32
    decoder = model.block(3)
    assert decoder.cross is not None and decoder.cross.cross and decoder.norms == 3
    assert attention(model).span.reach is Reach.ALL and attention(model, 3).span == CAUSAL
    assert attention(model).head_dim == 64 and t5(d_kv=8).attention.head_dim == 8


def test_t5_is_gated_if_its_activation_says_so() -> None:
    plain, gated = first(t5()).mlp, first(t5(feed_forward_proj="gated-gelu")).mlp
    assert not plain.gated and plain.activation is Activation.RELU
    assert gated.gated and gated.activation is Activation.GELU_TANH
    with pytest.raises(InputError, match="feed_forward_proj"):
        t5(feed_forward_proj="gated")


def test_an_untied_t5_is_counted_as_the_library_builds_it_and_says_so() -> None:
    model = t5(tie_word_embeddings=False)
    assert model.tied_embeddings and any("counted tied" in note for note in model.sources)
    assert not any("tied" in note for note in t5(tie_word_embeddings=True).sources)


def reaches(model: ModelSpec) -> str:
    """One letter a layer: the first of its reach; l for linear attention and state spaces."""
    letters = []
    for block in model.blocks():
        mixer = block.mixer
        letters.append("l" if mixer is None or not hasattr(mixer, "span") else str(mixer.span.reach)[:2])
    return " ".join(letters)


QWEN_WINDOW = {"sliding_window": 8, "use_sliding_window": True}
MOE4 = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("gemma2", {}, "wi ca wi ca wi ca wi ca"),
        ("gemma3_text", {}, "wi wi wi wi wi ca wi wi"),
        ("gemma3_text", {"sliding_window_pattern": 2}, "wi ca wi ca wi ca wi ca"),
        ("olmo3", {}, "wi wi wi ca wi wi wi ca"),
        ("cohere2", {}, "wi wi wi ca wi wi wi ca"),
        ("gpt_oss", MOE4, "wi ca wi ca wi ca wi ca"),
        ("mistral", {}, "wi " * 7 + "wi"),
        ("qwen2", {"sliding_window": 8}, "ca " * 7 + "ca"),
        ("qwen2", {**QWEN_WINDOW, "max_window_layers": 5}, "ca " * 5 + "wi wi wi"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 8}, "ca " * 7 + "ca"),
        ("phi3", {"sliding_window": 2047}, "wi " * 7 + "wi"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "ca ca ca wi ca ca ca wi"),
        ("llama4_text", MOE4, "ch ch ch ca ch ch ch ca"),
        ("minimax", MOE4, "ca l ca l ca l ca l"),
        ("qwen3_next", {"num_experts": 4, "num_experts_per_tok": 2}, "l l l ca l l l ca"),
        ("qwen3_5_text", {"full_attention_interval": 2}, "l ca l ca l ca l ca"),
        ("ministral", {"layer_types": ["full_attention", "sliding_attention"] * 4}, "ca wi " * 3 + "ca wi"),
    ],
)  # fmt: skip
def test_which_keys_each_layer_meets(model_type: str, keys: dict[str, Any], expected: str) -> None:
    assert reaches(read(model_type, **{"num_hidden_layers": 8, **keys})) == expected


def test_gpt_neo_repeats_its_attention_types() -> None:
    neo = {"model_type": "gpt_neo", "hidden_size": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 128}
    assert reaches(read_config(neo, source="c", name="x")) == "ca wi ca wi"
    listed = {**neo, "attention_types": [[["global"], 2], [["local"], 2]]}
    assert reaches(read_config(listed, source="c", name="x")) == "ca ca wi wi"


def test_linear_layers_are_of_their_own_class() -> None:
    delta = load_model("qwen3-next-80b-a3b")
    assert isinstance(first(delta).mixer, DeltaNet) and attention(delta, 3).gated
    lightning = load_model("minimax-text-01")
    assert isinstance(first(lightning).mixer, LightningAttention)
    hybrid = load_model("nemotron-h-56b")
    kinds = {type(block.mixer).__name__ for block in hybrid.blocks()}
    assert kinds == {"StateSpace", "Attention", "NoneType"}
    assert isinstance(first(hybrid).mixer, StateSpace) and first(hybrid).norms == 1
    assert first(hybrid).mlp is None


def test_the_text_model_of_a_wrapper_is_read_with_class_defaults() -> None:
    """As gemma-3-4b is published: heads, head_dim and vocabulary are left to the class."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    model = read_config(config, source="c", name="x")
    assert model.params_total == 3_880_263_168  # the text model of the published 4,300,079,472
    assert any("not counted" in note for note in model.sources)
    assert any("num_attention_heads = 8, vocab_size = 262208" in note for note in model.sources)
    assert model.model_type == "gemma3_text" and model.tied_embeddings


def test_a_wrapper_may_hold_its_text_model_flat_or_under_other_names() -> None:
    flat = read("qwen2_5_vl", vision_config={"depth": 32}, num_key_value_heads=2)
    assert flat.model_type == "qwen2_5_vl_text" and attention(flat).qkv_bias
    assert any("not counted" in note for note in flat.sources)
    config = {"model_type": "internvl", "llm_config": {"model_type": "qwen3", **DIMS}}
    assert read_config(config, source="c", name="x").model_type == "qwen3"
    unknown = {"model_type": "brand_new_vlm", "text_config": {"model_type": "llama", **DIMS}}
    assert read_config(unknown, source="c", name="x").model_type == "llama"


def test_a_wrapper_says_whether_embeddings_are_tied_where_its_text_model_does_not() -> None:
    text = {"model_type": "qwen3_vl_text", **DIMS}
    for tied in (True, False):
        config = {"model_type": "qwen3_vl", "text_config": text, "tie_word_embeddings": tied}
        assert read_config(config, source="c", name="x").tied_embeddings is tied


def test_faults_of_a_nested_model_are_at_their_path() -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **DIMS, "head_dim": -1}}
    with pytest.raises(InputError, match=r"c: text_config\.head_dim: is -1"):
        read_config(config, source="c", name="x")


def test_quantised_weights_and_extra_prediction_layers_are_noted() -> None:
    keys = {"quantization_config": {"quant_method": "fp8"}, "num_nextn_predict_layers": 1}
    model = read("deepseek_v3", **ROUTED, **keys)
    assert any("dequantised" in note for note in model.sources)
    assert any("multi-token prediction" in note for note in model.sources)
    assert model.params_total == read("deepseek_v3", **ROUTED).params_total


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "sliding_window", 4096),
        ("llama", "kv_lora_rank", 512),
        ("qwen2", "num_experts", 8),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("deepseek_v3", "index_topk", 2048),
        ("qwen3", "layer_types", ["linear_attention"] * 4),
        ("llama", "layer_types", ["sliding_attention"] * 4),
    ],
)
def test_what_a_family_does_not_have_is_refused(model_type: str, key: str, value: object) -> None:
    assert f"c: {key}: " in faults(model_type, **{key: value})


def mpt(**keys: Any) -> ModelSpec:
    dims = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128}
    return read_config({"model_type": "mpt", **dims, **keys}, source="c", name="x")


@pytest.mark.parametrize(
    "keys",
    [
        {"expansion_ratio": 3},
        {"no_bias": False},
        {"attn_config": {"alibi": False}},
        {"attn_config": {"qk_ln": True}},
    ],
)
def test_mpt_is_read_only_as_the_library_builds_it(keys: dict[str, Any]) -> None:
    assert mpt(expansion_ratio=4).norm is Norm.LAYERNORM_WITHOUT_BIAS
    with pytest.raises(InputError, match=next(iter(keys))):
        mpt(**keys)


def test_a_window_that_is_not_used_is_no_window() -> None:
    assert attention(read("llama", sliding_window=4096, use_sliding_window=False)).span == CAUSAL


@pytest.mark.parametrize(
    "keys",
    [
        {"attention_dropout": 0.0, "router_aux_loss_coef": 0.001, "output_router_logits": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "use_cache": True},
        {"torch_dtype": "bfloat16", "transformers_version": "4.51.0", "eos_token_id": [1, 2]},
        {"mlp_only_layers": [], "max_window_layers": 28, "pretraining_tp": 1, "norm_topk_prob": True},
    ],
)  # fmt: skip
def test_keys_of_published_configs_that_say_nothing_are_no_note(keys: dict[str, Any]) -> None:
    assert read("qwen2", **keys).sources == ()
