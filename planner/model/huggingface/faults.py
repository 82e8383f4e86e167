"""What contradicts itself in a Description: heads that do not divide, lists of another length, top-k."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from planner.model.huggingface.family import Description, Family
from planner.model.huggingface.keys import CHUNKED, DENSE, FULL, INDEXED, LINEAR, SLIDING, SPARSE
from planner.model.huggingface.layers import HYBRID_LETTERS, nowhere
from planner.model.huggingface.segments import (
    decoder,
    delta_decoder,
    hybrid_decoder,
    latent_decoder,
    layer_kinds,
    lightning_decoder,
    sink_decoder,
)

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
