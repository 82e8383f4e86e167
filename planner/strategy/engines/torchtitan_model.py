"""A model as a flavour of torchtitan 0.2.2: one that it has, or one to be registered beside them.

Classes and flavours are those of torchtitan/models/*/__init__.py and model/args.py. A flavour that it lacks
is written as a Python module, which a job imports by `experimental.custom_import`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from planner.foundation.frozen import frozen
from planner.model.arithmetic import PLAIN, Arithmetic, RopeKind, RopeScaling
from planner.model.attention import CAUSAL, Attention, LatentAttention, QkNorm
from planner.model.feed_forward import Activation, Experts, Mlp, Score
from planner.model.spec import Block, ModelSpec, Norm

MODULE = "shardwise_flavor"
FLAVOR = "shardwise"

Shape = tuple[int, int, int, int, int, int]

LLAMA3_SCALING = RopeScaling(
    kind=RopeKind.LLAMA3,
    factor=8.0,
    original_positions=8192,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
"""RoPEScalingArgs of models/llama3/model/args.py, which every flavour of llama3 has."""
LLAMA3_THETA, QWEN3_THETA = 500_000, 1_000_000
LLAMA3_TURNS = f"base {LLAMA3_THETA}, stretched as Llama 3.1's"
QWEN3_TURNS = f"base {QWEN3_THETA}"

LLAMA3_FLAVORS: dict[str, Shape] = {
    "8B": (4096, 32, 32, 8, 14336, 128256),
    "70B": (8192, 80, 64, 8, 28672, 128256),
    "405B": (16384, 126, 128, 8, 53248, 128256),
}
"""dim, n_layers, n_heads, n_kv_heads, width of the MLP, vocab_size."""

QWEN3_FLAVORS: dict[str, Shape] = {
    "0.6B": (1024, 28, 16, 8, 3072, 151936),
    "1.7B": (2048, 28, 16, 8, 6144, 151936),
    "4B": (2560, 36, 32, 8, 9728, 151936),
    "8B": (4096, 36, 32, 8, 12288, 151936),
    "14B": (5120, 40, 40, 8, 17408, 151936),
    "32B": (5120, 64, 64, 8, 25600, 151936),
}
"""The same, with heads of 128, normed queries and keys; the first three are tied."""
QWEN3_TIED = ("0.6B", "1.7B", "4B")


@frozen
class Flavor:
    """A model of torchtitan: its name, flavour, and the module to import where the flavour is not its own.

    `turns` says how its own flavour turns queries and keys, where that is not as the plan's model has it.
    """

    name: str
    flavor: str
    module: str | None = None
    turns: str = ""


def flavor_of(model: ModelSpec) -> Flavor | list[str]:
    """The flavour of a model, or in words why no class of torchtitan is it."""
    blocks = [block for block in model.blocks() if isinstance(block, Block)]
    faults = _faults(model, blocks)
    if faults:
        return faults
    mixer = blocks[0].mixer
    if isinstance(mixer, LatentAttention):
        return _deepseek(model, blocks, mixer)
    assert isinstance(mixer, Attention)
    experts = [block.mlp for block in blocks if isinstance(block.mlp, Experts)]
    plain = mixer.qk_norm is QkNorm.NONE and not model.tied_embeddings and not experts
    if plain and mixer.head_dim * mixer.heads == model.hidden:
        return _llama3(model, mixer, blocks[0])
    return _qwen3(model, mixer, blocks)


@lru_cache(maxsize=64)
def model_faults(model: ModelSpec) -> tuple[str, ...]:
    """Why no class of torchtitan is a model, in words; empty where one is."""
    found = flavor_of(model)
    return tuple(found) if isinstance(found, list) else ()


def _faults(model: ModelSpec, blocks: list[Block]) -> list[str]:
    arithmetic = model.arithmetic
    mixers = {block.mixer for block in blocks}
    dense = {block.mlp for block in blocks if isinstance(block.mlp, Mlp)}
    routed = {block.mlp for block in blocks if isinstance(block.mlp, Experts)}
    mlps = [*dense, *(each.expert for each in routed)]
    found = {
        "its layers were traced from a module": len(blocks) < model.layers,
        f"its norm is {model.norm}": model.norm is not Norm.RMSNORM,
        "its positions are not rotary": not model.rotary,
        "it has other ends than an embedding, a norm and a head": _other_ends(model),
        "its blocks are not two norms before two sublayers": any(
            block.norms != 2 or block.parallel or block.cross or block.mlp is None for block in blocks
        ),
        "its layers mix tokens in several ways": len(mixers) != 1,
        "its attention is not plain": not all(_plain(mixer) for mixer in mixers),
        "its MLPs are of several kinds": len(dense) > 1 or len(routed) > 1,
        "its MLPs are not gated by silu without biases": any(
            not mlp.gated or mlp.activation is not Activation.SILU or mlp.bias for mlp in mlps
        ),
        "its experts are routed in a way that its MoE has not": any(_other_routing(e) for e in routed),
        "it computes otherwise than Llama does": _other_arithmetic(arithmetic),
    }
    return [fault for fault, holds in found.items() if holds]


def _other_ends(model: ModelSpec) -> bool:
    return bool(
        model.encoder_layers
        or model.embedding_width
        or model.embedding_norm
        or model.token_types
        or model.pooler
        or model.head_bias
        or model.final_norms != 1
        or model.vocab == 0
    )


def _plain(mixer: Any) -> bool:
    if isinstance(mixer, LatentAttention):
        return not (mixer.bias or mixer.indexer) and mixer.span == CAUSAL
    if not isinstance(mixer, Attention):
        return False
    odd = mixer.gated or mixer.sinks or mixer.position_buckets or mixer.value_dim is not None
    norms = mixer.qk_norm in (QkNorm.NONE, QkNorm.HEAD)
    return not (odd or mixer.qkv_bias or mixer.out_bias) and mixer.span == CAUSAL and norms


def _other_routing(experts: Experts) -> bool:
    shared = experts.shared
    whole = shared is None or shared.width % experts.expert.width == 0
    odd = experts.latent is not None or experts.shared_gate or experts.router_bias
    return odd or not whole or experts.routing.capacity is not None


def _other_arithmetic(arithmetic: Arithmetic) -> bool:
    scaled = arithmetic.rope_scaling
    known = scaled is None or scaled.kind in (RopeKind.LLAMA3, RopeKind.YARN)
    defaults = {
        name: getattr(PLAIN, name)
        for name in Arithmetic.__dataclass_fields__
        if name not in ("rope_scaling", "rope_interleaved", "attention_scale", "rope_dims")
    }
    return not known or any(getattr(arithmetic, name) != value for name, value in defaults.items())


def _llama3(model: ModelSpec, mixer: Attention, block: Block) -> Flavor | list[str]:
    assert isinstance(block.mlp, Mlp)
    scaling, width = model.arithmetic.rope_scaling, block.mlp.width
    if scaling is not None and scaling.kind is not RopeKind.LLAMA3:
        return [f"its rotary frequencies are stretched by {scaling.kind}"]
    shape = (model.hidden, model.layers, mixer.heads, mixer.kv_heads, width, model.vocab)
    for name, known in LLAMA3_FLAVORS.items():
        if shape == known:
            same = scaling == LLAMA3_SCALING and model.rope_theta == LLAMA3_THETA
            return Flavor(name="llama3", flavor=name, turns="" if same else LLAMA3_TURNS)
    usual = int(8 * model.hidden / 3)  # FeedForward multiplies this, and rounds up to multiple_of
    arguments = {
        "dim": model.hidden,
        "n_layers": model.layers,
        "n_heads": mixer.heads,
        "n_kv_heads": mixer.kv_heads,
        "vocab_size": model.vocab,
        "multiple_of": width,
        "ffn_dim_multiplier": round(min(1.0, width / usual) * 0.9, 6),
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
    }
    extra = {
        "scaling_factor": scaling.factor if scaling else 1.0,
        "low_freq_factor": scaling.low_freq_factor if scaling else 1.0,
        "high_freq_factor": scaling.high_freq_factor if scaling else 4.0,
        "original_max_position_embeddings": scaling.original_positions if scaling else 8192,
    }
    imports = (
        "from torchtitan.models.llama3 import TransformerModelArgs, llama3_args\n"
        "from torchtitan.models.llama3.model.args import RoPEScalingArgs\n"
    )
    rope = f"    rope_scaling_args=RoPEScalingArgs({_call(extra)}),\n"
    return _module("llama3", "llama3_args", "TransformerModelArgs", imports, arguments, rope)


def _qwen3(model: ModelSpec, mixer: Attention, blocks: list[Block]) -> Flavor | list[str]:
    experts = next((b.mlp for b in blocks if isinstance(b.mlp, Experts)), None)
    dense = next((b.mlp for b in blocks if isinstance(b.mlp, Mlp)), None)
    if experts is not None and (dense is not None or experts.routing.groups > 1):
        return ["some of its layers are dense, or its experts are in groups, with plain attention"]
    if model.arithmetic.rope_scaling is not None:
        return ["its rotary frequencies are stretched, which only the class llama3 knows"]
    width = dense.width if dense else experts.expert.width if experts else 0
    shape = (model.hidden, model.layers, mixer.heads, mixer.kv_heads, width, model.vocab)
    normed = mixer.qk_norm is QkNorm.HEAD
    usual = normed and mixer.head_dim == 128 and experts is None
    for name, known in QWEN3_FLAVORS.items():
        if shape == known and usual and model.tied_embeddings == (name in QWEN3_TIED):
            turns = "" if model.rope_theta == QWEN3_THETA else QWEN3_TURNS
            return Flavor(name="qwen3", flavor=name, turns=turns)
    arguments = {
        "dim": model.hidden,
        "n_layers": model.layers,
        "n_heads": mixer.heads,
        "n_kv_heads": mixer.kv_heads,
        "vocab_size": model.vocab,
        "head_dim": mixer.head_dim,
        "hidden_dim": width,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "qk_norm": normed,
        "enable_weight_tying": model.tied_embeddings,
    }
    imports = "from torchtitan.models.qwen3 import Qwen3ModelArgs, qwen3_args\n"
    rest = ""
    if experts is not None:
        arguments |= {"moe_enabled": True, "moe_inter_dim": experts.expert.width}
        imports += "from torchtitan.models.moe import MoEArgs\n"
        rest = f"    moe_args=MoEArgs({_call(_moe(experts))}),\n"
    return _module("qwen3", "qwen3_args", "Qwen3ModelArgs", imports, arguments, rest)


def _deepseek(model: ModelSpec, blocks: list[Block], mixer: LatentAttention) -> Flavor | list[str]:
    dense = next((b.mlp for b in blocks if isinstance(b.mlp, Mlp)), None)
    experts = next((b.mlp for b in blocks if isinstance(b.mlp, Experts)), None)
    where = [isinstance(b.mlp, Experts) for b in blocks]
    if experts is None or not all(where[where.index(True) :]) or model.tied_embeddings:
        return ["its class of latent attention wants dense layers first, experts after them, no tied head"]
    scaling = model.arithmetic.rope_scaling
    arguments = {
        "vocab_size": model.vocab,
        "dim": model.hidden,
        "inter_dim": dense.width if dense else experts.expert.width,
        "moe_inter_dim": experts.expert.width,
        "n_layers": model.layers,
        "n_dense_layers": where.index(True),
        "n_heads": mixer.heads,
        "norm_eps": model.norm_eps,
        "q_lora_rank": mixer.query_rank or 0,
        "kv_lora_rank": mixer.kv_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "rope_theta": model.rope_theta,
        "original_seq_len": scaling.original_positions if scaling else max(model.max_positions, 1),
        "rope_factor": scaling.factor if scaling else 1.0,
    }
    imports = (
        "from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args\n"
        "from torchtitan.models.moe import MoEArgs\n"
    )
    rest = f"    moe_args=MoEArgs({_call(_moe(experts))}),\n"
    return _module("deepseek_v3", "deepseekv3_args", "DeepSeekV3ModelArgs", imports, arguments, rest)


def _moe(experts: Experts) -> dict[str, Any]:
    """MoEArgs of torchtitan/models/moe/moe.py."""
    routing, shared = experts.routing, experts.shared
    found: dict[str, Any] = {
        "num_experts": experts.count,
        "num_shared_experts": shared.width // experts.expert.width if shared else 0,
        "top_k": experts.topk,
        "score_func": "softmax" if routing.score is Score.SOFTMAX else "sigmoid",
        "route_norm": routing.normalised,
        "route_scale": routing.scale,
        "score_before_experts": False,
        "load_balance_coeff": routing.bias_speed or None,
    }
    if routing.groups > 1:
        found |= {"num_expert_groups": routing.groups, "num_limited_groups": routing.chosen_groups}
    return found


def _call(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _module(name: str, table: str, cls: str, imports: str, arguments: dict[str, Any], rest: str) -> Flavor:
    """The flavour and the module that registers it: text, which torchtitan imports."""
    body = "".join(f"    {key}={value!r},\n" for key, value in arguments.items())
    text = (
        f'"""The plan\'s model as flavour {FLAVOR!r} of {name}; a job imports it by '
        f'experimental.custom_import."""\n\n{imports}\n'
        f"{table}[{FLAVOR!r}] = {cls}(\n{body}{rest})\n"
    )
    return Flavor(name=name, flavor=FLAVOR, module=text)
