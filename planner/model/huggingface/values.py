"""Values of a config by key: looked up, checked for type and range, and shown in errors.

Keys of a config.json beside a family's own: what says nothing, what is noted, and what is refused.

What contradicts itself in a Description: heads that do not divide, lists of another length, top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from planner.foundation.errors import Problem
from planner.foundation.suggest import nearest_names
from planner.model.huggingface.family import (
    CHUNKED,
    DENSE,
    FULL,
    INDEXED,
    LINEAR,
    MAX_LAYERS,
    SLIDING,
    SPARSE,
    Description,
    Family,
    Key,
    Kind,
)
from planner.model.huggingface.segments import (
    HYBRID_LETTERS,
    decoder,
    delta_decoder,
    hybrid_decoder,
    latent_decoder,
    layer_kinds,
    lightning_decoder,
    nowhere,
    sink_decoder,
)

_TYPES: Mapping[Kind, type] = {
    Kind.WHOLE: int,
    Kind.REAL: float,
    Kind.FLAG: bool,
    Kind.TEXT: str,
    Kind.WHOLES: list,
    Kind.TEXTS: list,
    Kind.TYPES: list,
}


def show(value: Any) -> str:
    """A value for an error message, short whatever it is."""
    if isinstance(value, (dict, list)):
        return f"a {'table' if isinstance(value, dict) else 'list'} of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "an enormous number"
    return text if len(text) <= 60 else text[:57] + "..."


def lookup(config: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name, or None where it or an object on the way is absent or null."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def holds(config: Mapping[str, Any], name: str) -> bool:
    """Whether a dotted name is in a config, be it null."""
    *path, last = name.split(".")
    parent = lookup(config, ".".join(path)) if path else config
    return isinstance(parent, Mapping) and last in parent


@dataclass(frozen=True, slots=True)
class Values:
    """Reads keys of one config; collects what is wrong in `problems`, each at its path below `where`."""

    config: Mapping[str, Any]
    where: str
    problems: list[Problem] = field(default_factory=list)

    def at(self, name: str) -> str:
        return f"{self.where}{name}"

    def fault(self, name: str, fault: str, legal: str = "", fix: str = "") -> None:
        self.problems.append(Problem(where=self.at(name), fault=fault, legal=legal, fix=fix))

    def read(self, key: Key, names: tuple[str, ...], default: Any) -> Any:
        """The value under any of `names`, which must agree; the default where all are absent."""
        found = {name: value for name in names if (value := lookup(self.config, name)) is not None}
        if not found:
            if key.nullable and any(holds(self.config, name) for name in names):
                return None
            return key.choices[default] if key.choices and isinstance(default, str) else default
        (name, value), *others = found.items()
        for other, second in others:
            if second != value:
                self.fault(other, f"is {show(second)}, but {name} is {show(value)}, and both mean the same.")
        return self._checked(key, name, value)

    def _checked(self, key: Key, name: str, value: Any) -> Any:
        if key.kind is Kind.REAL and type(value) is int and abs(value) < 2**53:
            value = float(value)
        found: object = type(value)
        if found is not _TYPES[key.kind]:  # exactly: true is not 1, and 4096.0 is not 4096
            self.fault(name, f"is {show(value)}.", key.kind.value)
            return None
        if key.kind in (Kind.WHOLES, Kind.TEXTS):
            return self._list(key, name, value)
        if key.kind is Kind.TYPES:
            return self._repeated(name, value)
        return self._one(key, name, value)

    def _one(self, key: Key, name: str, value: Any) -> Any:
        """A number in its range, or a text among its choices."""
        if key.choices is not None:
            if value in key.choices:
                return key.choices[value]
            near = nearest_names(value[:60], key.choices)
            fix = f"did you mean '{near[0]}'" if near else ""
            self.fault(name, f"is {show(value)}.", ", ".join(key.choices), fix)
            return None
        if key.kind in (Kind.WHOLE, Kind.WHOLES, Kind.REAL) and not key.low <= value <= key.high:  # nor nan
            real = key.kind is Kind.REAL
            legal = f"{key.low:g} to {key.high:g}" if real else f"{key.low:.0f} to {key.high:.0f}"
            self.fault(name, f"is {show(value)}.", legal)
            return None
        return value

    def _list(self, key: Key, name: str, values: list[Any]) -> tuple[Any, ...] | None:
        """Every item checked as one value; the first that is wrong is reported."""
        if not self._short(name, values):
            return None
        wanted: object = int if key.kind is Kind.WHOLES else str
        checked = []
        for index, value in enumerate(values):
            found: object = type(value)
            if found is not wanted:
                kind = Kind.WHOLE if key.kind is Kind.WHOLES else Kind.TEXT
                self.fault(f"{name}[{index}]", f"is {show(value)}.", kind.value)
                return None
            before = len(self.problems)
            checked.append(self._one(key, f"{name}[{index}]", value))
            if len(self.problems) > before:
                return None
        return tuple(checked)

    def _short(self, name: str, values: list[Any]) -> bool:
        if len(values) > MAX_LAYERS:
            self.fault(name, f"is a list of {len(values)}.", f"at most {MAX_LAYERS} items")
        return len(values) <= MAX_LAYERS

    def _repeated(self, name: str, values: list[Any]) -> tuple[str, ...] | None:
        """[[types], repeats] one after the other, as gpt_neo writes them."""
        expanded: list[str] = []
        if not self._short(name, values):
            return None
        for index, item in enumerate(values):
            match item:
                case [[*kinds], int(times)] if (
                    set(map(str, kinds)) <= {"global", "local"} and 0 < times * len(kinds) <= MAX_LAYERS
                ):
                    expanded += kinds * times
                case _:
                    self.fault(f"{name}[{index}]", f"is {show(item)}.", '[["global", "local"], repeats]')
                    return None
            if len(expanded) > MAX_LAYERS:
                self.fault(name, f"describes {len(expanded)} layers.", f"at most {MAX_LAYERS}")
                return None
        return tuple(expanded)


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


Fault = tuple[str, str, str]
"""The fact, what is wrong, and what is legal."""

_KINDS_OF: tuple[tuple[object, tuple[str, ...]], ...] = (
    (decoder, (FULL, SLIDING, CHUNKED)),
    (sink_decoder, (FULL, SLIDING)),
    (latent_decoder, (FULL, INDEXED)),
    (delta_decoder, (FULL, LINEAR)),
    (lightning_decoder, (FULL, LINEAR)),
    (hybrid_decoder, (FULL, LINEAR, DENSE, SPARSE)),
)
"""The kinds of layer that each builder makes."""


_MAY_BE_EMPTY = ("rotary_layers", "windowed_layers", "sparse_flags")
_PER_LAYER = ("layer_types", "mlp_types", "indexer_types", "attention_types", *_MAY_BE_EMPTY)
"""Lists with one item a layer; those that may be empty mean the family's rule then."""


def contradictions(d: Description, family: Family) -> list[Fault]:
    """Every contradiction of the facts that `family` reads."""
    checks: tuple[Callable[[Description, Family], Iterator[Fault]], ...] = (
        _heads,
        _linear_heads,
        _lists,
        _layer_kinds,
        _experts,
    )
    return [fault for check in checks for fault in check(d, family)]


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 4096) + 1) if number % n == 0)[:80]


def _heads(d: Description, family: Family) -> Iterator[Fault]:
    if family.build is latent_decoder:
        return
    if d.head_dim is None and d.hidden % d.heads:
        name = family.names_of("hidden")[0]
        yield "heads", f"is {d.heads}, which does not divide {name} {d.hidden}.", f"divisors of {d.hidden}"
        return
    if "kv_heads" in family.defaults and d.heads % d.key_heads:
        text = f"is {d.key_heads}, which does not divide the {d.heads} heads."
        yield "kv_heads", text, _divisors(d.heads)
    if d.rotary and d.width_of_head % 2:
        yield "head_dim", f"is {d.width_of_head}; rotary positions turn pairs.", "even numbers"


def _linear_heads(d: Description, family: Family) -> Iterator[Fault]:
    if family.build is delta_decoder and d.delta_value_heads % d.delta_key_heads:
        text = f"is {d.delta_key_heads}, which does not divide the {d.delta_value_heads} value heads."
        yield "delta_key_heads", text, _divisors(d.delta_value_heads)
    if family.build is hybrid_decoder and d.state_heads % d.groups:
        text = f"is {d.groups}, which does not divide the {d.state_heads} state-space heads."
        yield "groups", text, _divisors(d.state_heads)
    inner = d.state_heads * d.state_head_dim
    if d.expand and d.expand * d.hidden != inner:
        yield "expand", f"is {d.expand} of {d.hidden}, but heads and their width make {inner}.", ""


def _lists(d: Description, family: Family) -> Iterator[Fault]:
    """Lists with one item a layer."""
    if d.layers == 0:
        return
    for fact in _PER_LAYER:
        listed = getattr(d, fact)
        if listed is not None and len(listed) != d.layers and (listed or fact not in _MAY_BE_EMPTY):
            yield fact, f"has {len(listed)} items for {d.layers} layers.", str(d.layers)
    for fact, pattern, unless in (
        ("hybrid_pattern", d.hybrid_pattern, d.layer_types),
        ("index_pattern", d.index_pattern, d.indexer_types),
    ):
        if pattern is not None and unless is None and len(pattern) != d.layers:
            yield fact, f"has {len(pattern)} letters for {d.layers} layers.", str(d.layers)


def _layer_kinds(d: Description, family: Family) -> Iterator[Fault]:
    """Kinds of layer that the family does not have, letters that mean nothing."""
    wrong = sorted(set(d.hybrid_pattern or "") - HYBRID_LETTERS.keys())
    if wrong:
        yield "hybrid_pattern", f"has the letter {wrong[0]!r}.", " ".join(HYBRID_LETTERS)
        return
    legal = next((kinds for build, kinds in _KINDS_OF if build is family.build), None)
    if legal is None or d.layer_types is None:
        return
    for kind in dict.fromkeys(d.layer_types):
        if kind not in legal:
            yield "layer_types", f"names '{kind}', which this family does not have.", ", ".join(legal)


def _experts(d: Description, family: Family) -> Iterator[Fault]:
    if set(d.hybrid_pattern or "") - HYBRID_LETTERS.keys():
        return
    sparse = any((family.sparse or nowhere)(d))
    if family.build is hybrid_decoder:
        sparse = SPARSE in layer_kinds(d, family)
    if sparse and d.experts == 0:
        yield "experts", "is 0, but layers have experts.", "1 or more"
    elif sparse and d.topk > d.experts:
        yield "topk", f"is {d.topk} of {d.experts} experts.", f"1 to {d.experts}"
    for fact in ("sparse_layers", "dense_layers"):
        listed = getattr(d, fact) or ()
        if any(layer >= d.layers for layer in listed):
            yield fact, f"names layer {max(listed)} of {d.layers}.", f"0 to {d.layers - 1}"
