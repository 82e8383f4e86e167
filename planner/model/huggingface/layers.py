"""Which kind every layer is, and which layers hold experts, where a config does not list it.

Rules are those of the configuration classes of transformers 5.23.0; layers count from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.model.huggingface.family import Description
from planner.model.huggingface.keys import CHUNKED, DENSE, FULL, INDEXED, LINEAR, SLIDING, SPARSE

HYBRID_LETTERS = {"M": LINEAR, "E": SPARSE, "*": FULL, "-": DENSE}
"""Letters of nemotron_h's hybrid_override_pattern."""


def all_full(d: Description) -> Sequence[str]:
    return (FULL,) * d.layers


def all_windowed(d: Description) -> Sequence[str]:
    """Every layer has the window, if there is one."""
    return (SLIDING if d.window and d.use_window else FULL,) * d.layers


def full_every_nth(other: str) -> Callable[[Description], Sequence[str]]:
    """Every `full_every`-th layer is full attention, the rest are `other`."""

    def kinds(d: Description) -> Sequence[str]:
        return tuple(other if (layer + 1) % d.full_every else FULL for layer in range(d.layers))

    return kinds


def full_first_and_every_sixth(d: Description) -> Sequence[str]:
    """The first layer and every sixth is full attention, the rest have the window, unless flagged (mimo)."""
    if d.windowed_layers:
        return tuple(SLIDING if windowed else FULL for windowed in d.windowed_layers)
    return tuple(SLIDING if layer and (layer + 1) % 6 else FULL for layer in range(d.layers))


def windowed_from(d: Description) -> Sequence[str]:
    """Layers from `first_window` on have the window (qwen2, qwen3)."""
    windowed = d.use_window and d.window is not None
    return tuple(SLIDING if windowed and layer >= d.first_window else FULL for layer in range(d.layers))


def windowed_before(d: Description) -> Sequence[str]:
    """Every other layer before `first_window` has the window (qwen2_moe)."""
    return tuple(
        SLIDING if d.use_window and (layer + 1) % 2 and layer < d.first_window else FULL
        for layer in range(d.layers)
    )


def linear_at_odd(d: Description) -> Sequence[str]:
    """Full attention and linear attention in turn (minimax)."""
    return tuple(FULL if (layer + 1) % 2 else LINEAR for layer in range(d.layers))


def is_rotary(d: Description, layer: int) -> bool:
    """Whether a layer has rotary positions: all but every `rotary_every`-th, unless listed."""
    if d.rotary_layers:
        return bool(d.rotary_layers[layer])
    return bool((layer + 1) % d.rotary_every)


def chunked_where_rotary(d: Description) -> Sequence[str]:
    """Layers with rotary positions see a chunk, the others everything (llama4)."""
    return tuple(CHUNKED if is_rotary(d, layer) else FULL for layer in range(d.layers))


def windowed_where_not_rotary(d: Description) -> Sequence[str]:
    """Layers without rotary positions have the window, if it is used (smollm3)."""
    windowed = d.use_window and d.window is not None
    return tuple(SLIDING if windowed and not is_rotary(d, layer) else FULL for layer in range(d.layers))


def all_linear(d: Description) -> Sequence[str]:
    return (LINEAR,) * d.layers


def all_indexed(d: Description) -> Sequence[str]:
    return (INDEXED,) * d.layers


def by_attention_types(d: Description) -> Sequence[str]:
    """Global and local attention as attention_types repeats them (gpt_neo)."""
    listed = d.attention_types or ("global", "local") * (d.layers // 2 + 1)
    return tuple(SLIDING if kind == "local" else FULL for kind in listed[: d.layers])


def by_hybrid_pattern(d: Description) -> Sequence[str]:
    """One letter a layer (nemotron_h)."""
    return tuple(HYBRID_LETTERS[letter] for letter in d.hybrid_pattern or "ME*-")


def nowhere(d: Description) -> Sequence[bool]:
    return (False,) * d.layers


def everywhere(d: Description) -> Sequence[bool]:
    return (True,) * d.layers


def after_first_dense(d: Description) -> Sequence[bool]:
    """The first layers are dense, the rest sparse (deepseek, glm); `mlp_types` lists them in newer files."""
    if d.mlp_types is not None:
        return tuple(kind == SPARSE for kind in d.mlp_types)
    if d.sparse_flags:
        return tuple(map(bool, d.sparse_flags))
    return tuple(layer >= d.first_dense and layer % d.sparse_every == 0 for layer in range(d.layers))


def every_step(d: Description) -> Sequence[bool]:
    """Every `sparse_every`-th layer is sparse, but those that are listed as dense (qwen)."""
    dense = set(d.dense_layers or ())
    return tuple(
        d.experts > 0 and layer not in dense and (layer + 1) % d.sparse_every == 0
        for layer in range(d.layers)
    )


def listed_or_every_step(d: Description) -> Sequence[bool]:
    """Every `sparse_every`-th layer is sparse, unless the sparse ones are listed (llama4)."""
    if d.sparse_layers is None:
        return every_step(d)
    sparse = set(d.sparse_layers)
    return tuple(layer in sparse for layer in range(d.layers))
