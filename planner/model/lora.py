"""LoRA: matrices of low rank beside the weights of a model, and how many parameters they train.

Which weights is said by a group (`AdapterModules`) or by the names of modules, with commas between. Names are
those of Hugging Face's llama, and of deepseek_v3 for latent attention, whatever a family calls its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from planner.foundation.errors import Problem
from planner.foundation.suggest import nearest_names
from planner.model.feed_forward import MLP_MODULES, Mlp
from planner.model.mixers import Mixer
from planner.model.spec import Block, Layer, ModelSpec
from planner.model.sublayer import WeightMatrix
from planner.model.workload import AdapterModules, Adapters

_QUERY_VALUE = frozenset(
    {
        *("q_proj", "v_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        *("in_proj", "in_proj_qkvz", "qkv_proj"),
    }
)
"""Modules that queries or values come from, of latents and of states too; keys may come from them as well."""
_QUERY_KEY_VALUE = _QUERY_VALUE | {"k_proj"}


def adapted(layer: Layer, modules: str) -> tuple[WeightMatrix, ...]:
    """The weights of a layer that get adapters; routers and experts never do."""
    return tuple(matrix for name, matrix in _adaptable(layer) if _chosen(modules)(name))


def adapts(modules: str, name: str) -> bool:
    """Whether the module of an attention or a dense MLP that has this name gets an adapter."""
    return _chosen(modules)(name)


def module_names(model: ModelSpec) -> tuple[str, ...]:
    """The names of all modules of a model that may get adapters, in their order."""
    names = (name for layer in model.classes().values() for name, _ in _adaptable(layer))
    return tuple(dict.fromkeys(names))


def written(modules: str) -> str:
    """Modules as they are kept: a group as it is, names without blanks, each once."""
    return ",".join(_split(modules))


def module_problems(modules: str, model: ModelSpec) -> list[Problem]:
    """What is wrong with the modules asked for: names that the model does not have, or none at all."""
    known, names = module_names(model), _split(modules)
    if modules in list(AdapterModules):
        return []
    groups = ", ".join(AdapterModules)
    legal = f"{groups}, or names of {', '.join(known)}"
    if not names:
        return [Problem(where="--lora-modules", fault="names no module.", legal=legal)]
    return [_unknown(name, model, known, legal) for name in names if name not in known]


def _unknown(name: str, model: ModelSpec, known: Iterable[str], legal: str) -> Problem:
    shown = repr(name[:60])
    if name in list(AdapterModules):
        fault, near = f"{shown} is a group of modules, which stands alone.", []
    else:
        fault, near = (
            f"{model.name} has no module {shown} that takes an adapter.",
            nearest_names(name[:60], known),
        )
    fix = f"did you mean {' or '.join(near)}" if near else ""
    return Problem(where="--lora-modules", fault=fault, legal=legal, fix=fix)


def _split(modules: str) -> list[str]:
    names = (name.strip() for name in modules.split(","))
    return list(dict.fromkeys(name for name in names if name))


@cache
def _chosen(modules: str) -> Callable[[str], bool]:
    match modules:
        case AdapterModules.QV:
            return _QUERY_VALUE.__contains__
        case AdapterModules.QKV:
            return _QUERY_KEY_VALUE.__contains__
        case AdapterModules.ATTENTION:
            return lambda name: name not in MLP_MODULES
        case AdapterModules.ALL:
            return lambda name: True
        case _:
            return frozenset(_split(modules)).__contains__


def _adaptable(layer: Layer) -> list[tuple[str, WeightMatrix]]:
    """The weights of a layer that may get adapters, with their names."""
    if not isinstance(layer, Block):
        return []
    parts: list[Mixer | Mlp] = [*layer.mixers]
    if isinstance(layer.mlp, Mlp):
        parts.append(layer.mlp)
    return [
        pair for part in parts for pair in zip(part.module_names, part.matrices(layer.hidden), strict=True)
    ]


def adapter_params(adapters: Adapters, model: ModelSpec) -> int:
    """r (in + out) for each adapted weight of every layer."""
    return sum(
        segment.count * adapters.rank * (matrix.inputs + matrix.outputs)
        for segment in model.segments
        for matrix in adapted(segment.block, adapters.modules)
    )


def adapted_weights(adapters: Adapters, model: ModelSpec) -> int:
    """How many weights of the model get adapters."""
    return sum(segment.count * len(adapted(segment.block, adapters.modules)) for segment in model.segments)


def layer_adapter_params(adapters: Adapters, layer: Layer, tp: int = 1) -> float:
    """Adapter parameters on one of `tp` tensor-parallel ranks: r (in + out) of each weight's shard.

    The half beside the split dimension is sharded with it; the other half is whole on every rank.
    """
    held = layer.with_kv_copies(tp) if isinstance(layer, Block) else layer
    shards = [matrix.shard(tp) for matrix in adapted(held, adapters.modules)]
    return adapters.rank * sum(inputs + outputs for inputs, outputs in shards)
