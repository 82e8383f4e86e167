"""Stack: the software that runs a step, as far as it changes what the step costs."""

from __future__ import annotations

from enum import StrEnum

from planner.codec import noun
from planner.mixers import AttentionKernel


class Engine(StrEnum):
    """The training framework, which decides what is kept in which format and what overlaps."""

    NATIVE = "native"
    MEGATRON = "megatron"
    DEEPSPEED = "deepspeed"
    TORCHTITAN = "torchtitan"


@noun
class Stack:
    """An engine, its attention kernel, the named set of its fused kernels, and whether blocks are compiled.

    `kernels` is empty for the engine's usual ones; otherwise constants that were fitted for that name apply.
    """

    engine: Engine = Engine.NATIVE
    attention: AttentionKernel = AttentionKernel.FLASH
    kernels: str = ""
    compiled: bool = False


NATIVE = Stack()
