"""The layer classes that a profile has samples of: which models have them, and what they compute.

A sample names its class by a key alone. Models of the catalog that have a layer of that key, or models that
are named besides, say what it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from planner.foundation.frozen import frozen
from planner.hardware.catalog import load_model, model_index
from planner.hardware.measured_tables import wire_factor
from planner.model.spec import Block, Layer, ModelSpec
from planner.model.sublayer import Recompute
from planner.profile.profile import (
    NOISY_SPREAD,
    CommSample,
    LayerKind,
    LayerSample,
    OperatorKind,
    OperatorSample,
    Profile,
    shape_key,
)

ClassKey = tuple[LayerKind, str]

BACKWARD = 2
"""FLOPs of the backward pass for one of the forward: gradients of inputs and of weights."""


@frozen
class SampledClass:
    """A layer class with samples, and the models that have it, those first that have most of the others too.

    `number` of `classes` tells classes of the first model apart.
    """

    kind: LayerKind
    shape_key: str
    models: tuple[ModelSpec, ...] = ()
    number: int = 1
    classes: int = 1

    @property
    def key(self) -> ClassKey:
        return self.kind, self.shape_key

    @property
    def model(self) -> ModelSpec | None:
        """The model that it is shown as a layer of, or None where none is known."""
        return self.models[0] if self.models else None

    @property
    def block(self) -> Layer | None:
        """The block itself, where a model that has it is known."""
        if self.model is None or self.kind is not LayerKind.BLOCK:
            return None
        return self.model.classes()[self.shape_key]

    @property
    def title(self) -> str:
        """`block of llama-3-8b and 1 more`, `block 2/3 of jamba`, or its key."""
        if not self.models:
            return f"{self.kind} {self.shape_key}"
        which = f" {self.number}/{self.classes}" if self.classes > 1 else ""
        more = f" and {len(self.models) - 1} more" if len(self.models) > 1 else ""
        return f"{self.kind}{which} of {self.models[0].name}{more}"

    def forward_flops(self, sample: LayerSample) -> float | None:
        """FLOPs of one rank's forward pass; None where the model is not known, or the layer has no products.

        Of experts, balanced over their ranks: as many as if every rank kept its own tokens.
        """
        tokens = sample.micro_batch * sample.seq / sample.cp
        if self.model is not None and self.kind is LayerKind.HEAD:
            return 2.0 * tokens * self.model.token_width * self.model.vocab_shard(sample.tp)
        block = self.block
        if block is None:
            return None
        if isinstance(block, Block):
            block = block.with_kv_copies(sample.tp)
        return (
            block.matmul_flops_forward(tokens) + block.attention_flops_forward(tokens, sample.seq)
        ) / sample.tp

    def flops_per_s(self, sample: LayerSample) -> float | None:
        """The rate of both passes; what is recomputed takes time and does not count."""
        forward = self.forward_flops(sample)
        total_s = sample.forward_s + sample.backward_s
        return None if forward is None or total_s <= 0 else (1 + BACKWARD) * forward / total_s


def sampled_classes(profile: Profile, own: Sequence[ModelSpec] = ()) -> dict[ClassKey, SampledClass]:
    """The classes of a profile's samples in order of first use, named by `own` models, else the catalog.

    Of several models that have a class, the one that has most of the profile's classes comes first.
    """
    keys = list(dict.fromkeys((s.kind, s.shape_key) for s in profile.layers))
    models = [*own, *_candidates(key for _, key in keys)]
    having = {key: [model for model in models if _has(model, key)] for key in keys}
    shared = {model.name: sum(model in found for found in having.values()) for model in models}
    order = {name: place for place, name in enumerate(shared)}
    return {
        key: _sampled(key, sorted(found, key=lambda m: (-shared[m.name], order[m.name])))
        for key, found in having.items()
    }


def _candidates(keys: Iterable[str]) -> list[ModelSpec]:
    """Models of the catalog that are as wide as one of the layers: reading all takes a second."""
    widths = {int(found[1]) for key in keys if (found := re.match(r"h(\d+)-", key))}
    return [load_model(name) for name, entry in model_index().items() if entry.hidden in widths]


def _has(model: ModelSpec, key: ClassKey) -> bool:
    kind, name = key
    if kind is LayerKind.BLOCK:
        return name in model.classes()
    return model.vocab > 0 and shape_key(model, kind) == name


def _sampled(key: ClassKey, models: Sequence[ModelSpec]) -> SampledClass:
    kind, name = key
    if not models:
        return SampledClass(kind=kind, shape_key=name)
    classes = list(models[0].classes()) if kind is LayerKind.BLOCK else [name]
    return SampledClass(
        kind=kind,
        shape_key=name,
        models=tuple({model.name: model for model in models}.values()),
        number=classes.index(name) + 1,
        classes=len(classes),
    )


def covered_models(classes: Mapping[ClassKey, SampledClass]) -> tuple[str, ...]:
    """Models all of whose block classes have samples."""
    blocks = {key for kind, key in classes if kind is LayerKind.BLOCK}
    models = {model.name: model for found in classes.values() for model in found.models}
    return tuple(name for name, model in sorted(models.items()) if set(model.classes()) <= blocks)


def width_text(sample: LayerSample) -> str:
    """In how many shards a sample was taken: `tp 2 sp`, `tp 1 cp 4 ring`, `tp 1 ep 8`."""
    parts = [f"tp {sample.tp}{' sp' if sample.sequence_parallel else ''}"]
    if sample.cp > 1:
        parts.append(f"cp {sample.cp} {sample.cp_exchange or ''}".rstrip())
    parts += [f"ep {sample.ep}"] if sample.ep > 1 else []
    parts += [f"etp {sample.etp}"] if sample.etp not in (None, sample.tp) else []
    return " ".join(parts)


def variant_text(sample: LayerSample) -> str:
    """What samples of one class differ by besides their shards and tokens: `fp32`, `bf16 compiled`."""
    return f"{sample.precision}{' compiled' if sample.compiled else ''}"


def sample_text(sample: LayerSample) -> str:
    """A sample among those of its class: `tp 2 sp, 4 x 256 tokens, full recompute`."""
    again = "" if sample.recompute is Recompute.NONE else f", {sample.recompute} recompute"
    return f"{width_text(sample)}, {sample.micro_batch} x {sample.seq:,} tokens{again}"


def group_title(sample: CommSample) -> str:
    """`groups of 2, 2 at once`, and how far apart and on how many nodes, if on several."""
    apart = f" {sample.stride} apart" if sample.stride > 1 else ""
    nodes = f" on {sample.nodes} nodes" if sample.nodes > 1 else ""
    at_once = f", {sample.groups} at once" if sample.groups > 1 else ""
    return f"groups of {sample.ranks}{apart}{nodes}{at_once}"


def bus_bytes_per_s(sample: CommSample) -> float:
    """Bytes a second over a rank's link, by the best algorithm on a ring; 0 where no time was measured."""
    if sample.seconds <= 0:
        return 0.0
    return wire_factor(sample.op, sample.ranks) * sample.bytes / sample.seconds


Timed = LayerSample | CommSample | OperatorSample
"""What has a spread."""


def timed(profile: Profile) -> list[Timed]:
    """All layers, collectives and operators of a profile."""
    return [*profile.layers, *profile.comms, *profile.rates]


def noisy(profile: Profile) -> list[Timed]:
    """Samples whose runs lie further apart than the cost model trusts each by itself."""
    return [sample for sample in timed(profile) if is_noisy(sample)]


def is_noisy(sample: Timed) -> bool:
    """Whether the runs of a sample lie far apart."""
    return sample.spread > NOISY_SPREAD


def kind_text(sample: OperatorSample) -> str:
    """`gemm bf16`, `activation silu-gated fp32`: an operator without its sizes."""
    parts = (sample.kind.replace("_", " "), sample.variant, str(sample.precision))
    return " ".join(part for part in parts if part)


def rate_text(sample: OperatorSample) -> str:
    """An operator with its sizes: `gemm bf16, 4,096 x 4,096 x 1,024`."""
    return f"{kind_text(sample)}, {' x '.join(f'{dim:,}' for dim in sample.dims)}"


def rate_flops(sample: OperatorSample) -> float | None:
    """FLOPs of an operator's forward pass; None where it only moves values. Going back it has twice.

    Attention is causal: the half of its scores and values that is not masked. The loss is chunked: both its
    gradients are taken in the forward pass.
    """
    dims = sample.dims
    match sample.kind:
        case OperatorKind.GEMM | OperatorKind.GROUPED:
            return 2.0 * math.prod(dims)
        case OperatorKind.CROSS_ENTROPY:
            return 6.0 * math.prod(dims)
        case OperatorKind.ATTENTION:
            heads, tokens, head_dim = dims
            return 2.0 * heads * tokens * tokens * head_dim
    return None


def rate_values(sample: OperatorSample) -> int:
    """Values that an operator reads or writes, by which its sizes are compared: rows of an embedding, of
    experts' inputs, bytes of a copy."""
    match sample.kind:
        case OperatorKind.EMBEDDING:
            tokens, _, hidden = sample.dims
            return tokens * hidden
        case OperatorKind.ROUTING:
            tokens, _, chosen, hidden = sample.dims
            return tokens * chosen * hidden
    return math.prod(sample.dims)
