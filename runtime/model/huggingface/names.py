"""What each family of models calls its weights in Hugging Face's files, as data.

Source: the modelling classes of transformers 5.23.0 and the files that its `save_pretrained` writes.

Where each of our parameters lies in Hugging Face's tensors: an exact map, row by row.

    ours [rows, ...]  =  pieces, each some consecutive rows of one tensor of theirs

A weight that they store as [inputs, outputs] is meant transposed: its rows are its columns in the file. Of
stacked experts each is a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType

from torch import Tensor, nn

from planner.foundation.errors import InputError, Problem
from planner.model.feed_forward import Mlp
from planner.model.spec import Block, ModelSpec
from planner.strategy.engines.native import plain_parts
from runtime.model.transformer import build_transformer

NOTHING: Mapping[str, str] = MappingProxyType({})
EXPERT: Mapping[str, str] = MappingProxyType(
    {ours: f"mlp.experts.{{}}.{ours}_proj" for ours in ("gate", "up", "down")}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """One tensor that holds several of our projections, row after row.

    The rows come in `groups` equal groups (0: as many as there are key-value heads), each with its share of
    every member in their order.
    """

    name: str
    members: tuple[str, ...]
    groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The names of one family. `block` maps our modules of a block to the family's, below `layer`.

    `transposed` are modules whose weights lie as [inputs, outputs]. `expert` has the names of one expert's
    projections, by its number, and `correction` that of the bias of a router's choice.
    """

    embedding: str = "model.embed_tokens"
    positions: str = ""
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}."
    block: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    fused: tuple[Fused, ...] = ()
    transposed: frozenset[str] = frozenset()
    expert: Mapping[str, str] = field(default_factory=lambda: EXPERT)
    correction: str = "mlp.gate.e_score_correction_bias"

    def renamed(self, **modules: str) -> Names:
        """These names with some modules of the block called otherwise; `__` stands for a dot."""
        changed = {ours.replace("__", "."): theirs for ours, theirs in modules.items()}
        return replace(self, block=MappingProxyType({**self.block, **changed}))


def _projections(prefix: str, **modules: str) -> dict[str, str]:
    return {f"{prefix}.{ours}": theirs for ours, theirs in modules.items()}


_ATTENTION = _projections(
    "attention",
    wq="self_attn.q_proj",
    wk="self_attn.k_proj",
    wv="self_attn.v_proj",
    wo="self_attn.o_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)
_MLP = _projections("mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
_MOE = {
    "mlp.router": "mlp.gate",
    "mlp.shared_gate": "mlp.shared_expert_gate",
    **{f"mlp.shared.{ours}": f"mlp.shared_experts.{ours}_proj" for ours in ("gate", "up", "down")},
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}

LLAMA = Names(block=MappingProxyType({**_ATTENTION, **_MLP, **_MOE, **_NORMS}))

_SANDWICH = LLAMA.renamed(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
_GATE_UP = Fused(name="mlp.gate_up_proj", members=("mlp.gate", "mlp.up"))
_QKV = ("attention.wq", "attention.wk", "attention.wv")
_PLAIN_MLP = LLAMA.renamed(mlp__up="mlp.fc1", mlp__down="mlp.fc2")
_PHI = replace(
    _PLAIN_MLP.renamed(
        attention__wo="self_attn.dense",
        attention__q_norm="self_attn.q_layernorm",
        attention__k_norm="self_attn.k_layernorm",
    ),
    norm="model.final_layernorm",
)
_GLM4 = LLAMA.renamed(
    attention_out_norm="post_self_attn_layernorm",
    mlp_norm="post_attention_layernorm",
    mlp_out_norm="post_mlp_layernorm",
)
_LATENTS = _projections(
    "attention",
    wq_down="self_attn.q_a_proj",
    wq_up="self_attn.q_b_proj",
    wkv_down="self_attn.kv_a_proj_with_mqa",
    wkv_up="self_attn.kv_b_proj",
)
_LATENT = replace(LLAMA, block=MappingProxyType({**LLAMA.block, **_LATENTS})).renamed(
    attention__q_norm="self_attn.q_a_layernorm", attention__kv_norm="self_attn.kv_a_layernorm"
)
PROJECTIONS: Mapping[str, str] = MappingProxyType(
    {
        path: name.rsplit(".", 1)[1]
        for path, name in {**_ATTENTION, **_LATENTS, **_MLP}.items()
        if not path.endswith("_norm")
    }
)
"""What llama and deepseek_v3 call the projections of a block, below their sublayer (planner.model.lora)."""
_MIXTRAL = replace(
    LLAMA.renamed(mlp__router="block_sparse_moe.gate"),
    expert=MappingProxyType(
        {
            ours: f"block_sparse_moe.experts.{{}}.{theirs}"
            for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        }
    ),
)
_QWEN2_MOE = LLAMA.renamed(
    mlp__shared__gate="mlp.shared_expert.gate_proj",
    mlp__shared__up="mlp.shared_expert.up_proj",
    mlp__shared__down="mlp.shared_expert.down_proj",
)
_GPT2 = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    norm="transformer.ln_f",
    layer="transformer.h.{}.",
    block=MappingProxyType(
        {
            "attention_norm": "ln_1",
            "mlp_norm": "ln_2",
            "attention.wo": "attn.c_proj",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        }
    ),
    fused=(Fused(name="attn.c_attn", members=_QKV),),
    transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
)
_GPTJ = replace(_GPT2, positions="", fused=(), transposed=frozenset()).renamed(
    attention__wq="attn.q_proj",
    attention__wk="attn.k_proj",
    attention__wv="attn.v_proj",
    attention__wo="attn.out_proj",
    mlp__up="mlp.fc_in",
    mlp__down="mlp.fc_out",
)
_CODEGEN_QKV = ("attention.wq", "attention.wv", "attention.wk")
_NEOX = Names(
    embedding="gpt_neox.embed_in",
    norm="gpt_neox.final_layer_norm",
    head="embed_out",
    layer="gpt_neox.layers.{}.",
    block=MappingProxyType(
        {
            **_NORMS,
            "attention.wo": "attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        }
    ),
    fused=(Fused(name="attention.query_key_value", members=_QKV, groups=0),),
)
_FALCON = Names(
    embedding="transformer.word_embeddings",
    norm="transformer.ln_f",
    layer="transformer.h.{}.",
    block=_NEOX.renamed(attention__wo="self_attention.dense").block,
    fused=(Fused(name="self_attention.query_key_value", members=_QKV, groups=0),),
)
_OPT = Names(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{}.",
    block=_PLAIN_MLP.renamed(
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        attention__wo="self_attn.out_proj",
        mlp__up="fc1",
        mlp__down="fc2",
    ).block,
)
_GPT_NEO = replace(_GPT2, fused=(), transposed=frozenset()).renamed(
    attention__wq="attn.attention.q_proj",
    attention__wk="attn.attention.k_proj",
    attention__wv="attn.attention.v_proj",
    attention__wo="attn.attention.out_proj",
)

FAMILY_NAMES: Mapping[str, Names] = MappingProxyType(
    {
        **dict.fromkeys(
            ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "granite", "arcee", "seed_oss"),
            LLAMA,
        ),
        **dict.fromkeys(("ernie4_5", "smollm3", "olmo", "cohere", "cohere2", "nemotron", "stablelm"), LLAMA),
        **dict.fromkeys(("gemma2", "gemma3_text"), _SANDWICH),
        **dict.fromkeys(("olmo2", "olmo3"), _SANDWICH),
        **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), _LATENT),
        **dict.fromkeys(("glm", "glm4"), replace(_GLM4, fused=(_GATE_UP,))),
        **dict.fromkeys(("qwen3_moe", "olmoe", "glm4_moe"), LLAMA),
        "mixtral": _MIXTRAL,
        "qwen2_moe": _QWEN2_MOE,
        "phi": _PHI,
        "phi3": replace(LLAMA, fused=(Fused(name="self_attn.qkv_proj", members=_QKV), _GATE_UP)),
        "starcoder2": LLAMA.renamed(mlp__up="mlp.c_fc", mlp__down="mlp.c_proj"),
        "gpt2": _GPT2,
        "gptj": _GPTJ,
        "codegen": replace(_GPTJ, fused=(Fused(name="attn.qkv_proj", members=_CODEGEN_QKV, groups=4),)),
        "gpt_neo": _GPT_NEO,
        "gpt_neox": _NEOX,
        "falcon": _FALCON,
        "opt": _OPT,
    }
)
"""The names of every family whose weights are read and written."""

BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""Ends of names that older files hold beside the weights: tables that are computed, not learned."""


def names_of(spec: ModelSpec) -> Names:
    """The names of a model's family. Raises InputError for a family whose weights are not known."""
    names = FAMILY_NAMES.get(spec.model_type)
    if names is None:
        fault = f"is of the family {spec.model_type}, whose weights have no mapping to Hugging Face's."
        raise InputError(Problem(where=spec.name, fault=fault, legal=", ".join(FAMILY_NAMES)))
    block = spec.block(0)
    if spec.model_type == "falcon" and isinstance(block, Block) and block.parallel and block.norms == 2:
        return names.renamed(attention_norm="ln_attn", mlp_norm="ln_mlp")
    return names


@dataclass(frozen=True, slots=True)
class Piece:
    """Our rows [first, first + rows) are the rows of `key` from `begin` on; our row `first` alone is the
    whole of `key` where that is one of `stacked` tensors."""

    key: str
    first: int
    begin: int
    rows: int
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Mapped:
    """One of our parameters: its shape, and the pieces that cover its rows in order."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class KeyMap:
    """All parameters of a model; `shapes` are those of their tensors as they lie in files, by key."""

    parameters: tuple[Mapped, ...]
    shapes: dict[str, tuple[int, ...]]
    transposed: frozenset[str]


@cache
def key_map(spec: ModelSpec) -> KeyMap:
    """The map of a whole model. Raises InputError for a family whose names are not known."""
    names = names_of(spec)
    model = build_transformer(spec, 0, spec.layers, True, True, seq=1)
    parameters, turned = [], set()
    for name, tensor in _weights(model):
        shape = tuple(tensor.shape)
        pieces = tuple(_pieces(name, shape[0], names, spec))
        if len(shape) > 1 and _is_transposed(pieces[0].key, names):
            turned.add(pieces[0].key)
        parameters.append(Mapped(name, shape, pieces))
    return KeyMap(tuple(parameters), _shapes(parameters, turned), frozenset(turned))


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what is kept beside them: the bias that corrects a router's choice."""
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(".correction"))


def _pieces(name: str, rows: int, names: Names, spec: ModelSpec) -> Iterator[Piece]:
    if not name.startswith("layers."):
        module, leaf = name.rsplit(".", 1)
        own = {
            "tok_embeddings": names.embedding,
            "positions": names.positions,
            "norm": names.norm,
            "output": names.head,
        }
        yield Piece(f"{own[module]}.{leaf}", 0, 0, rows)
        return
    _, layer, inner = name.split(".", 2)
    module, leaf = inner.rsplit(".", 1)
    prefix = names.layer.format(layer)
    if module == "mlp.experts":
        for expert in range(rows):
            key = f"{prefix}{names.expert[leaf].format(expert)}.weight"
            yield Piece(key, expert, 0, 1, stacked=True)
        return
    if leaf == "correction":
        yield Piece(f"{prefix}{names.correction}", 0, 0, rows)
        return
    fused = next((fused for fused in names.fused if module in fused.members), None)
    if fused is None:
        yield Piece(f"{prefix}{names.block[module]}.{leaf}", 0, 0, rows)
    else:
        yield from _fused_pieces(fused, module, f"{prefix}{fused.name}.{leaf}", spec, int(layer))


def _fused_pieces(fused: Fused, module: str, key: str, spec: ModelSpec, layer: int) -> Iterator[Piece]:
    """The rows of one member of a fused tensor, group by group."""
    heights = {member: _rows_of(member, spec, layer) for member in fused.members}
    _, mixer, _ = plain_parts(spec.block(layer))
    groups = fused.groups or mixer.kv_heads
    height = sum(heights.values()) // groups
    before = sum(heights[m] for m in fused.members[: fused.members.index(module)]) // groups
    own = heights[module] // groups
    for group in range(groups):
        yield Piece(key, group * own, group * height + before, own)


def _rows_of(member: str, spec: ModelSpec, layer: int) -> int:
    _, mixer, mlp = plain_parts(spec.block(layer))
    if member.startswith("mlp."):
        assert isinstance(mlp, Mlp), (member, mlp)
        return mlp.width
    return mixer.query_width if member == "attention.wq" else mixer.kv_heads * mixer.head_dim


def _is_transposed(key: str, names: Names) -> bool:
    return any(key.endswith(f".{module}.weight") for module in names.transposed)


def _shapes(parameters: list[Mapped], turned: set[str]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the files: all rows of its pieces, by the width of ours."""
    shapes: dict[str, tuple[int, ...]] = {}
    for mapped in parameters:
        for piece in mapped.pieces:
            if piece.stacked:
                shapes[piece.key] = mapped.shape[1:]
                continue
            rows = shapes.get(piece.key, (0,))[-1 if piece.key in turned else 0]
            whole = (rows + piece.rows, *mapped.shape[1:])
            shapes[piece.key] = whole[::-1] if piece.key in turned else whole
    return shapes
