"""What an engine does where nothing is said: defaults that complete a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from planner.job.engine_settings import Engine
from planner.model.attention import CpExchange
from planner.strategy.strategy import Degrees

USUAL_EXCHANGE: Mapping[Engine, CpExchange] = MappingProxyType(
    {
        Engine.MEGATRON: CpExchange.RING,
        Engine.DEEPSPEED: CpExchange.ALL_TO_ALL,
        Engine.TORCHTITAN: CpExchange.GATHER,
        Engine.NATIVE: CpExchange.GATHER,
    }
)
"""Megatron-LM's cp_comm_type is p2p, DeepSpeed's way is Ulysses, torch's context_parallel gathers."""


def usual_exchange(engine: Engine | None) -> CpExchange:
    """How context-parallel ranks exchange keys and values unless told otherwise."""
    return Degrees().cp_exchange if engine is None else USUAL_EXCHANGE[engine]


def usual_sequence_parallel(engine: Engine | None, tp: int) -> bool:
    """Whether tensor parallelism shards the sequence unless told otherwise: torchtitan's always does."""
    return engine is Engine.TORCHTITAN and tp > 1
