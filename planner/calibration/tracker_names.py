"""Names under which trackers and frameworks log what a run measured and how it was laid out.

A name is compared in small letters with every other character as `_`, with or without a leading group
(`train/`, `perf/`, ...). A setting is compared by the last part of its path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from planner.foundation.frozen import frozen
from planner.foundation.units import GIB, MIB


@frozen
class Quantity:
    """A logged figure: the column of runs.csv that it fills, its unit in SI, and the names it goes by.

    `per_unit` where the column's figure is 1 over the logged one (steps a second); `per_device` where the
    logged one is that of one device.
    """

    column: str
    unit: float
    names: tuple[str, ...]
    per_unit: bool = False
    per_device: bool = False


STEP, TOKENS = "step_time_s", "tokens_per_s"
ALLOCATED, RESERVED = "peak_memory_gib", "peak_reserved_gib"

QUANTITIES: Mapping[str, Quantity] = MappingProxyType(
    {
        "step_time_s": Quantity(
            column=STEP,
            unit=1.0,
            names=(
                "step_time_s", "step_time", "step_time_seconds", "iteration_time", "iteration_time_s",
                "iter_time", "time_per_step", "time_per_iteration", "seconds_per_step", "sec_per_step",
                "s_per_step", "elapsed_time_per_iteration", "train_step_timing", "train_step_timing_in_s",
                "time_metrics_end_to_end_s", "end_to_end_s", "dt",
            ),
        ),
        "step_time_ms": Quantity(
            column=STEP,
            unit=1e-3,
            names=(
                "step_time_ms", "iteration_time_ms", "iter_time_ms", "elapsed_time_per_iteration_ms",
                "ms_per_step", "dt_ms", "step_ms",
            ),
        ),
        "steps_per_s": Quantity(
            column=STEP,
            unit=1.0,
            names=("steps_per_s", "steps_per_sec", "steps_per_second", "it_per_s", "batches_per_sec"),
            per_unit=True,
        ),
        "tokens_per_s": Quantity(
            column=TOKENS,
            unit=1.0,
            names=(
                "tokens_per_s", "tokens_per_sec", "tokens_per_second", "tok_per_sec", "tok_s",
                "total_tokens_per_second", "global_tokens_per_second",
            ),
        ),
        "tokens_per_s_per_device": Quantity(
            column=TOKENS,
            unit=1.0,
            names=(
                "tokens_per_s_per_device", "tokens_per_s_per_gpu", "tokens_per_sec_per_gpu",
                "tokens_per_second_per_gpu", "tokens_per_gpu_per_second", "device_tokens_per_sec",
                "device_tokens_per_second", "tgs", "throughput_tps", "tps",
            ),
            per_device=True,
        ),
        "allocated_bytes": Quantity(
            column=ALLOCATED,
            unit=1 / GIB,
            names=("peak_memory_bytes", "max_memory_allocated", "max_memory_allocated_bytes",
                   "peak_allocated_bytes", "max_allocated_bytes"),
        ),
        "allocated_mib": Quantity(
            column=ALLOCATED, unit=MIB / GIB, names=("max_memory_allocated_mib", "peak_allocated_mib")
        ),
        "allocated_gib": Quantity(
            column=ALLOCATED,
            unit=1.0,
            names=("peak_memory_gib", "peak_allocated_gib", "max_memory_allocated_gib", "max_allocated_gib",
                   "peak_memory_alloc", "max_active_gib", "memory_max_active_gib"),
        ),
        "allocated_gb": Quantity(
            column=ALLOCATED, unit=1e9 / GIB,
            names=("peak_allocated_mem", "peak_allocated_gb", "max_memory_allocated_gb"),
        ),
        "reserved_bytes": Quantity(
            column=RESERVED, unit=1 / GIB,
            names=("max_memory_reserved", "max_memory_reserved_bytes", "peak_reserved_bytes"),
        ),
        "reserved_gib": Quantity(
            column=RESERVED,
            unit=1.0,
            names=("peak_reserved_gib", "max_memory_reserved_gib", "max_reserved_gib",
                   "peak_memory_reserved"),
        ),
        "reserved_gb": Quantity(
            column=RESERVED, unit=1e9 / GIB,
            names=("peak_reserved_mem", "peak_reserved_gb", "max_memory_reserved_gb"),
        ),
    }
)  # fmt: skip
"""What `--metric` names. Sources: the logs of plan train, torchtitan, torchtune, Megatron-LM, NeMo,
llm-foundry, nanotron, nanoGPT; llm-foundry's memory is in 10^9 bytes, torchtitan's tps of one device."""

GROUPS = ("train", "training", "trainer", "perf", "performance", "metrics", "timers", "timing", "time",
          "throughput", "stats", "system", "memory", "gpu")  # fmt: skip
"""Parts before a figure's own name that say where it is logged, not what it is."""

SETTINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model": ("model_name", "model_name_or_path", "pretrained_model_name_or_path", "model_id", "flavor"),
        "layers": ("layers", "num_layers", "n_layer", "n_layers", "num_hidden_layers"),
        "hidden": ("hidden", "hidden_size", "n_embd", "d_model", "embed_dim"),
        "ffn": ("ffn", "ffn_hidden_size", "intermediate_size"),
        "heads": ("heads", "num_attention_heads", "n_head", "n_heads", "num_heads"),
        "kv_heads": ("kv_heads", "num_key_value_heads", "num_query_groups", "n_kv_heads"),
        "vocab": ("vocab", "padded_vocab_size", "vocab_size"),
        "experts": ("experts", "num_experts", "num_moe_experts", "num_local_experts"),
        "topk": ("topk", "moe_router_topk", "num_experts_per_tok"),
        "expert_ffn": ("expert_ffn", "moe_ffn_hidden_size", "moe_intermediate_size"),
        "tied_embeddings": ("tied_embeddings", "tie_word_embeddings", "share_embeddings_and_output_weights"),
        "seq_len": (
            "seq_len", "seq_length", "sequence_length", "block_size", "max_seq_len", "max_seq_length",
            "context_length", "encoder_seq_length",
        ),
        "global_batch": ("global_batch", "global_batch_size", "global_train_batch_size", "gbs"),
        "micro_batch": (
            "micro_batch", "micro_batch_size", "device_train_microbatch_size", "local_batch_size",
            "per_device_train_batch_size", "mbs",
        ),
        "device": ("device_name", "gpu_type"),
        "nodes": ("nodes", "num_nodes", "nnodes"),
        "gpus_per_node": ("gpus_per_node", "devices_per_node", "num_gpus_per_node", "nproc_per_node",
                          "gpu_count"),
        "network": ("network",),
        "framework": ("framework",),
        "precision": ("precision", "mixed_precision"),
        "tp": ("tp", "tp_size", "tensor_model_parallel_size", "tensor_parallel_size",
               "tensor_parallel_degree"),
        "pp": ("pp", "pp_size", "pipeline_model_parallel_size", "pipeline_parallel_size",
               "pipeline_parallel_degree"),
        "chunks": ("chunks", "virtual_pipeline_model_parallel_size"),
        "dp": ("dp", "dp_size", "data_parallel_size"),
        "cp": ("cp", "cp_size", "context_parallel_size", "context_parallel_degree"),
        "ep": ("ep", "ep_size", "expert_model_parallel_size", "expert_parallel_degree"),
        "zero": ("zero", "zero_stage"),
        "sequence_parallel": ("sequence_parallel",),
        "recompute": ("recompute", "recompute_granularity", "gradient_checkpointing",
                      "activation_checkpointing", "activations_checkpoint_granularity"),
        "compile": ("compile", "torch_compile"),
    }
)  # fmt: skip
"""Settings that are read from a run's configuration, by column of runs.csv."""


def plain(name: str) -> str:
    """A name in small letters with `_` for all else: `mem/peak(GiB)` is mem_peak_gib."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def quantity_of(name: str) -> str | None:
    """The quantity that a logged name stands for, or None."""
    text = plain(name)
    while True:
        found = next((key for key, quantity in QUANTITIES.items() if text in quantity.names), None)
        group, _, rest = text.partition("_")
        if found is not None or group not in GROUPS:
            return found
        text = rest


def column_of(path: str) -> str | None:
    """The column of runs.csv that a setting fills, by the last part of its path, or None."""
    last = plain(path.rsplit(".", 1)[-1])
    return next((column for column, names in SETTINGS.items() if last in names), None)


def names_for(columns: Iterable[str]) -> str:
    """Under which logged names a figure is found, for messages."""
    wanted = set(columns)
    names: Sequence[str] = [n for q in QUANTITIES.values() if q.column in wanted for n in q.names]
    return ", ".join(names)
