"""Stack: the software that runs a step, as far as it changes what the step costs."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING

from planner.foundation.frozen import frozen
from planner.model.sublayer import AttentionKernel
from planner.model.workload import Precision

if TYPE_CHECKING:
    from planner.hardware.cluster import ClusterSpec

SCALING = r"aleph|aa-scaling"
"""Names of Aleph Alpha's framework (github.com/Aleph-Alpha/scaling)."""

OLD_TORCH = r"composer|sagemaker"
"""Frameworks whose published runs are of torch before 2.1: llm-foundry's tables of 2023, BloombergGPT's."""


class Engine(StrEnum):
    """The training framework, which decides what is kept in which format and what overlaps."""

    NATIVE = "native"
    MEGATRON = "megatron"
    DEEPSPEED = "deepspeed"
    TORCHTITAN = "torchtitan"

    @property
    def family(self) -> str:
        """Engines of one family launch, wrap and overlap alike: a fit to one speaks of all."""
        return "pytorch" if self in (Engine.NATIVE, Engine.TORCHTITAN) else str(self)


class Selective(StrEnum):
    """What selective recomputation does not keep: element-wise results, the attention's core, the MLP.

    `every_second` keeps the result of attention and of every second product, the first among them:
    torchtitan's default (activation_checkpoint.selective_ac_option "op").
    """

    ELEMENTWISE = "elementwise"
    ATTENTION = "attention"
    MLP = "mlp"
    EVERY_SECOND = "every_second"


class Dispatch(StrEnum):
    """How tokens are sent to the ranks of their experts: a copy for each, or one for each rank and node."""

    ALL_TO_ALL = "all_to_all"
    DEDUPLICATED = "deduplicated"


@frozen
class EngineSettings:
    """An engine, its attention kernel, the named set of its fused kernels, and whether blocks are compiled.

    `framework` is its full name where constants were fitted for that very one.
    `selective` is what selective recomputation means; None: what it does in that engine.
    `ampere_flash` is a flash kernel written for Ampere: FlashAttention-1 or 2, not cuDNN's or a later one.
    `dispatch_bytes` are those of a value on its way to an expert; None: those of the compute precision.
    `balanced` says that routing is forced to be even, as benchmarks do; `overlaps_gradients` that an engine
    which can reduce gradients behind the backward pass is told to, `overlaps_dispatch` that tokens are sent
    to experts behind another micro-batch's products, `graphed` that whole steps are replayed as CUDA graphs,
    `fused_experts` that one kernel holds an expert's products and its activation, `fp8_attention` that
    under fp8 the products between tokens are in fp8 too.
    `fused_loss` is a kernel of the loss that reads 16-bit logits and writes their gradient in 16 bits.
    `liger`: the Liger kernels (arXiv 2410.10989): head and loss are one, over chunks of tokens, so that the
    logits never exist as a whole; the MLP keeps its inputs alone and writes their gradients in their place.
    `kernels` is empty for the engine's usual ones; otherwise constants that were fitted for that name apply.
    """

    engine: Engine = Engine.NATIVE
    framework: str = ""
    attention: AttentionKernel = AttentionKernel.FLASH
    kernels: str = ""
    compiled: bool = False
    selective: Selective | None = None
    ampere_flash: bool = False
    dispatch: Dispatch = Dispatch.ALL_TO_ALL
    dispatch_bytes: int | None = None
    balanced: bool = False
    overlaps_gradients: bool = False
    overlaps_dispatch: bool = False
    graphed: bool = False
    fused_experts: bool = False
    fp8_attention: bool = False
    liger: bool = False
    fused_loss: bool = False

    @property
    def fuses_elementwise(self) -> bool:
        """Whether element-wise kernels are fused without a compiler: Megatron's, since flash kernels."""
        return self.engine is Engine.MEGATRON and self.attention is AttentionKernel.FLASH

    @property
    def accumulates_in_products(self) -> bool:
        """Whether products of weight gradients add to the sum of earlier ones themselves: Megatron's
        gradient_accumulation_fusion, of the same time as its flash kernels."""
        return self.fuses_elementwise

    @property
    def recomputes(self) -> Selective:
        """What selective recomputation does not keep: the engine's own kind unless the stack says another."""
        own = {Engine.MEGATRON: Selective.ATTENTION, Engine.TORCHTITAN: Selective.EVERY_SECOND}
        return self.selective or own.get(self.engine, Selective.ELEMENTWISE)

    @property
    def own(self) -> bool:
        """Whether this is the project's own runtime, not another program that runs on PyTorch as it does."""
        return self.engine is Engine.NATIVE and not self.framework

    @property
    def keeps_compiled(self) -> bool:
        """Whether blocks keep what compiled ones do. The own runtime's are taken to keep what eager ones do,
        some of it in vain: their plans have to fit where a machine has no compiler, too."""
        return self.compiled and not self.own

    @property
    def compiles_experts(self) -> bool:
        """Whether blocks with experts are compiled. The own runtime compiles what is around the experts, and
        is charged for none of it."""
        return self.compiled and not self.own

    @property
    def chunks_loss(self) -> bool:
        """Whether head and loss are one, over chunks of tokens, so that all logits never exist."""
        return self.liger or self.own

    @property
    def stops_early(self) -> bool:
        """Whether recomputation ends when all that going back needs is there again: that of
        torch.utils.checkpoint since torch 2.1. Megatron-LM runs a block's whole forward again, or of its
        selective kind only the core of attention, which sends nothing (arXiv 2205.05198)."""
        torch = self.engine in (Engine.NATIVE, Engine.TORCHTITAN)
        return torch and not re.search(OLD_TORCH, self.framework.lower())

    @property
    def recomputes_once(self) -> bool:
        """Whether a backward split into inputs and weights recomputes a block once, not for every weight."""
        return self.own

    @property
    def defers_products(self) -> bool:
        """Whether a split backward leaves the factors of weight gradients for later and frees all else."""
        return self.own

    @property
    def gathers_logits(self) -> bool:
        """Whether every tensor-parallel rank takes the loss over the whole vocabulary, not over its shard.

        DeepSpeed has no tensor-parallel loss of its own; those of pipelines built like it gather (for one,
        github.com/Aleph-Alpha/scaling, core/nn/linear and transformer/model/losses).
        """
        return self.engine is Engine.DEEPSPEED

    def reduces_whole(self, precision: Precision) -> bool:
        """Whether every data rank sums all gradients, in fp32 and after the last backward, though ZeRO shares
        out the update: Aleph Alpha's (core/optimizer/allreduce), and sums that are kept beside."""
        return bool(re.search(SCALING, self.framework.lower())) or self.accumulates_beside(precision)

    @property
    def sends_operands_cast(self) -> bool:
        """Whether what tensor-parallel ranks gather for products in fp8, activations going forward and
        gradients going back, is cast first, so that half the bytes are sent: Transformer Engine's modules
        (gather_along_first_dim with a quantizer)."""
        return self.engine is Engine.MEGATRON

    @property
    def scatters_boundaries(self) -> bool:
        """Whether each tensor-parallel rank sends its share of a stage's result, where all hold it whole, and
        the next stage puts the shares together: Megatron-LM's scatter and gather (arXiv 2104.04473, 4.1), and
        PartitionedTensor of DeepSpeed's pipeline, on which Megatron-DeepSpeed runs."""
        return self.engine is Engine.MEGATRON

    def accumulates_beside(self, precision: Precision) -> bool:
        """Whether bf16 gradients are summed in fp32 beside themselves, and these sums reduced whole:
        DeepSpeed's BF16_Optimizer in its pipeline, with which Megatron-DeepSpeed trained BLOOM (arXiv
        2211.05100; deepspeed/runtime/pipe/engine.py, _bf16_reduce_grads)."""
        pipelined = self.engine is Engine.MEGATRON and "deepspeed" in self.framework.lower()
        return pipelined and precision is Precision.BF16

    @property
    def keeps_gathered(self) -> bool:
        """Whether sublayers keep their input whole under sequence parallelism; Megatron gathers it again."""
        return self.engine is not Engine.MEGATRON


NATIVE = EngineSettings()


def native_settings(cluster: ClusterSpec) -> EngineSettings:
    """The own runtime's on a cluster: `plan train` compiles blocks on whatever is no CPU."""
    return EngineSettings(compiled=all(group.device.name != "cpu" for group in cluster.groups))
