"""Run: one measured run, as a row of runs.csv states it. None, or an empty text, is unknown."""

from __future__ import annotations

from enum import StrEnum

from planner.foundation.frozen import frozen
from planner.model.saved_tensors import AttentionKernel


class Status(StrEnum):
    """How a run ended. `error` is a fault that says nothing about its plan."""

    OK = "ok"
    OOM = "oom"
    ERROR = "error"


class MemoryKind(StrEnum):
    """Whose figure a peak is: the allocator's tensors, its reserved blocks, or the driver's."""

    ALLOCATED = "allocated"
    RESERVED = "reserved"
    DEVICE = "device"


class RunRecompute(StrEnum):
    """What a run recomputes; `mlp` is the MLP of every block and nothing else."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"
    MLP = "mlp"


@frozen
class Run:
    """One measured run.

    `dp` is the whole data-parallel degree. `embedding` and `head` are false where a pipeline stage was run
    without them. `memory_kind` says what `peak_memory_gib` is. `schedule`, `etp` (shards of one expert) and
    `cp_exchange` are columns of our own. `where` is the file and line.
    """

    id: str
    where: str
    group: str = ""
    source: str = ""
    model: str = ""
    layers: int | None = None
    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocab: int | None = None
    experts: int | None = None
    topk: int | None = None
    expert_ffn: int | None = None
    gated_mlp: bool | None = None
    tied_embeddings: bool | None = None
    embedding: bool | None = None
    head: bool | None = None
    seq_len: int | None = None
    device: str = ""
    nodes: int | None = None
    gpus_per_node: int | None = None
    network: str = ""
    framework: str = ""
    precision: str = ""
    attention: AttentionKernel | None = None
    fused_kernels: str = ""
    compile: bool | None = None
    tp: int | None = None
    pp: int | None = None
    chunks: int | None = None
    dp: int | None = None
    dp_replicate: int | None = None
    cp: int | None = None
    ep: int | None = None
    zero: int | None = None
    sequence_parallel: bool | None = None
    recompute: RunRecompute | None = None
    micro_batch: int | None = None
    global_batch: int | None = None
    status: Status | None = None
    step_time_s: float | None = None
    peak_memory_gib: float | None = None
    memory_kind: MemoryKind | None = None
    peak_reserved_gib: float | None = None
    device_used_gib: float | None = None
    notes: str = ""
    schedule: str = ""
    etp: int | None = None
    cp_exchange: str = ""

    @property
    def devices(self) -> int | None:
        """Devices of the cluster, where both factors are known."""
        if self.nodes is None or self.gpus_per_node is None:
            return None
        return self.nodes * self.gpus_per_node

    @property
    def words(self) -> str:
        """Framework, model and notes in small letters, in which details hide that no column holds."""
        return f"{self.framework} | {self.model} | {self.fused_kernels} | {self.notes}".lower()

    @property
    def group_name(self) -> str:
        """The group as stated; otherwise what makes runs comparable: model, workload, cluster, software."""
        if self.group:
            return self.group
        dims = (self.layers, self.hidden, self.ffn, self.heads, self.kv_heads, self.vocab)
        parts = (
            self.model or "-".join("?" if dim is None else str(dim) for dim in dims),
            f"{self.nodes or '?'}x{self.gpus_per_node or '?'}:{self.device or '?'}",
            f"s{self.seq_len or '?'}",
            f"b{self.global_batch or '?'}",
            self.precision,
            self.framework,
            self.fused_kernels,
        )
        return "|".join(part for part in parts if part)
