"""The model of a run: from its dimensions, or from the catalog where it names one that agrees with them.

Dimensions make one of two kinds of decoder. Gated MLPs: RMSNorm, no biases, rotary positions (Llama).
Others: LayerNorm, biases, a table of positions (GPT), unless a text of the row says otherwise.
"""

from __future__ import annotations

import dataclasses
import re

from planner.calibration.runs import Run
from planner.foundation.suggest import divisors, normalized
from planner.hardware.catalog import load_model, model_index
from planner.model.attention import Attention
from planner.model.feed_forward import Activation, Experts, FeedForward, Mlp
from planner.model.spec import Block, ModelSpec, Norm, Segment
from planner.strategy.estimate import Rejected

GPT_VOCAB = 50257
"""GPT-2's tokenizer, of rows that state no vocabulary; what tensor parallelism splits of it is padded."""

LLAMA_VOCAB = 32000
"""Vocabulary of Llama 1 and 2, for gated models whose row states none."""

WHOLE_EXPERTS = 16
"""Up to so many experts each is a whole MLP (Mixtral, Grok-1, DBRX); more are finer (DeepSeek, Qwen3)."""

USUAL_HEAD = 128
ROTARY = r"rotary|\brope\b"
WITHOUT_TABLE = rf"no position embed|alibi|\bmpt|{ROTARY}"
GATED_NAMES = r"llama|mistral|mixtral|qwen|gemma|deepseek|yi-|olmo|smollm|phi-3"
SIZE = r"\b(\d{1,5}(?:\.\d{1,4})?) ?[Bb]\b"
SIZE_ROUNDS = 0.03
"""Parameters in a model's name, in billions, and how far off one expects them to be."""

DECORATIONS = r"\(.*?\)|truncated to \d+ layers|\bproxy\b|\bsft\b|\bfull\b|\bfinetuning with.*|\bq?lora\b"
"""What tables write behind a model's name."""


class NamedModels:
    """Models of the catalog by the names that tables give them, each read once. A path is never read."""

    def __init__(self) -> None:
        index = model_index()
        self._names = {normalized(text): name for name in index for text in (name, *index[name].aliases)}
        self._known: dict[str, ModelSpec] = {}

    def find(self, text: str) -> ModelSpec | None:
        """The catalog's model of that name, or None."""
        name = self._names.get(normalized(re.sub(DECORATIONS, "", text.lower()).strip()))
        if name is None:
            return None
        if name not in self._known:
            self._known[name] = load_model(name)
        return self._known[name]


def run_model(run: Run, named_models: NamedModels, assumed: list[str]) -> ModelSpec | Rejected:
    """The model of a row, or why it cannot be known. What was taken for granted is added to `assumed`."""
    named = named_models.find(run.model)
    if named is not None and _agrees(run, named):
        return _ends(run, _as_run(run, named), assumed)
    if run.layers is None and run.hidden is not None:
        run = _with_layers(run, assumed)
    unknown = [name for name in ("layers", "hidden") if getattr(run, name) is None]
    if unknown:
        model = f"'{run.model}' is not in the catalog and " if run.model else ""
        return Rejected(rule="model_known", detail=f"{model}{' and '.join(unknown)} are unknown.")
    built = _from_dims(run, assumed)
    return built if isinstance(built, Rejected) else _ends(run, built, assumed)


def _with_layers(run: Run, assumed: list[str]) -> Run:
    """The run with as many layers as the size in its model's name tells at its width: in whole ones for every
    stage where the size leaves room for that. Unchanged where the name tells none."""
    size = re.search(SIZE, run.model)
    one = _from_dims(dataclasses.replace(run, layers=1), []) if size else None
    if size is None or not isinstance(one, ModelSpec):
        return run
    exact = 1 + (float(size.group(1)) * 1e9 - one.params_total) / one.params_blocks
    stages = (run.pp or 1) * (run.chunks or 1)
    even = max(1, round(exact / stages)) * stages
    layers = even if abs(even - exact) < SIZE_ROUNDS * exact else max(1, round(exact))
    assumed.append(f"layers {layers}, of {size.group(0)} parameters")
    return dataclasses.replace(run, layers=layers)


def _agrees(run: Run, model: ModelSpec) -> bool:
    """Whether no dimension that the row states contradicts the model; it may hold fewer layers."""
    attention = model.attention
    stated = [(run.hidden, model.hidden), (run.vocab, model.vocab)]
    if attention is not None:
        stated.append((run.heads, attention.heads))
    if isinstance(attention, Attention):
        stated.append((run.kv_heads, attention.kv_heads))
    mlps = [block.mlp for block in model.transformer_blocks() if block.mlp is not None]
    experts = next((mlp for mlp in mlps if isinstance(mlp, Experts)), None)
    if experts is not None:
        stated += [(run.experts, experts.count), (run.expert_ffn, experts.expert.width)]
    elif mlps and isinstance(mlps[0], Mlp):
        stated += [(run.ffn, mlps[0].width)]
        if run.experts:
            return False
    fits = run.layers is None or run.layers <= model.layers
    return fits and all(own is None or own == other for own, other in stated)


def _as_run(run: Run, model: ModelSpec) -> ModelSpec:
    """The model with the row's number of layers, tied weights and positions."""
    segments, left = [], run.layers or model.layers
    for segment in model.segments:
        count = min(segment.count, left)
        left -= count
        if count:
            segments.append(dataclasses.replace(segment, count=count))
    tied = model.tied_embeddings if run.tied_embeddings is None else run.tied_embeddings
    positions = model.learned_positions and max(model.learned_positions, run.seq_len or 0)
    return dataclasses.replace(
        model, segments=tuple(segments), tied_embeddings=tied, learned_positions=positions
    )


def _from_dims(run: Run, assumed: list[str]) -> ModelSpec | Rejected:
    assert run.hidden is not None and run.layers is not None, "checked before"
    gated = _is_gated(run, assumed)
    heads = run.heads
    if heads is None:
        heads = _usual_heads(run.hidden, run.tp or 1)
        assumed.append(f"heads {heads}")
    if run.hidden % heads:
        return Rejected(rule="model_known", detail=f"hidden {run.hidden} does not divide into {heads} heads.")
    mlp = _mlp(run, gated, assumed)
    if isinstance(mlp, Rejected):
        return mlp
    bias = not gated
    norm = Norm.RMSNORM if gated else Norm.LAYERNORM
    attention = Attention(
        heads=heads,
        kv_heads=run.kv_heads or heads,
        head_dim=run.hidden // heads,
        qkv_bias=bias,
        out_bias=bias,
    )
    block = Block(hidden=run.hidden, norm=norm, mixer=attention, mlp=mlp)
    table = not gated and not re.search(WITHOUT_TABLE, run.words)
    rotary = gated or re.search(ROTARY, run.words)
    seq = run.seq_len or 0
    return ModelSpec(
        name=run.model or run.id,
        model_type="llama" if gated else "gpt2",
        hidden=run.hidden,
        vocab=_vocab(run, gated, assumed),
        max_positions=seq,
        learned_positions=seq if table else 0,
        rope_theta=10_000.0 if rotary else 0.0,
        norm=norm,
        norm_eps=1e-5,
        initializer_range=0.02,
        tied_embeddings=bool(run.tied_embeddings),
        segments=(Segment(block=block, count=run.layers),),
    )


def _usual_heads(hidden: int, tp: int) -> int:
    """Heads of about USUAL_HEAD values each, as many for every tensor-parallel rank where that can be."""
    found = divisors(hidden)
    shared = [heads for heads in found if heads % tp == 0] or found
    return min(shared, key=lambda heads: abs(hidden / heads - USUAL_HEAD))


def _is_gated(run: Run, assumed: list[str]) -> bool:
    if run.gated_mlp is not None:
        return run.gated_mlp
    gated = bool(re.search(GATED_NAMES, run.model.lower()))
    assumed.append("gated MLP" if gated else "MLP without a gate")
    return gated


def _mlp(run: Run, gated: bool, assumed: list[str]) -> FeedForward | Rejected:
    activation = Activation.SILU if gated else Activation.GELU_TANH
    if run.experts is not None:
        return _experts(run, gated, activation, assumed)
    width = run.ffn
    if width is None:
        if gated:
            return Rejected(rule="model_known", detail="ffn is unknown: a gated MLP has no usual width.")
        assert run.hidden is not None, "checked before"
        width = 4 * run.hidden
        assumed.append(f"ffn {width}")
    return Mlp(width=width, gated=gated, activation=activation, bias=not gated)


def _experts(run: Run, gated: bool, activation: Activation, assumed: list[str]) -> FeedForward | Rejected:
    """Routed experts without shared ones. Of few experts, each is as wide as the row's MLP."""
    assert run.experts is not None, "checked before"
    width = run.expert_ffn
    if width is None and run.ffn is not None and run.experts <= WHOLE_EXPERTS:
        width = run.ffn
        assumed.append(f"expert_ffn {width}")
    if width is None or run.topk is None:
        absent = [name for name, value in (("topk", run.topk), ("expert_ffn", width)) if value is None]
        return Rejected(
            rule="model_known",
            detail=f"{run.experts} experts, and {' and '.join(absent)} unknown.",
            legal="a model of the catalog, or topk and expert_ffn",
        )
    expert = Mlp(width=width, gated=gated, activation=activation)
    return Experts(count=run.experts, topk=min(run.topk, run.experts), expert=expert)


def _vocab(run: Run, gated: bool, assumed: list[str]) -> int:
    if run.vocab is not None:
        return run.vocab
    usual = LLAMA_VOCAB if gated else GPT_VOCAB
    if run.embedding is not False or run.head is not False:
        assumed.append(f"vocab {usual}")
    return usual


def _ends(run: Run, model: ModelSpec, assumed: list[str]) -> ModelSpec | Rejected:
    """The model without the ends that a lone pipeline stage was run without."""
    embedding, head = run.embedding is not False, run.head is not False
    if embedding and head:
        return model
    if not embedding and not head:
        return dataclasses.replace(model, vocab=0, learned_positions=0, tied_embeddings=False)
    if head:
        assumed.append("the head's weight stands for an embedding that was not there")
        return dataclasses.replace(model, tied_embeddings=True, learned_positions=0)
    return Rejected(rule="ends", detail="a stage with the embedding and without the head is not modelled.")
