"""The columns of runs.csv that a plan of ours fills, and what of it no column can say.

A rehearsed plan as a row of runs.csv: the peak of its fullest rank, or that memory ran out.
"""

from __future__ import annotations

from typing import Any

from planner.calibration.runs import MemoryKind, Run, Status
from planner.foundation.decode import digest
from planner.foundation.errors import InputError, Problem
from planner.foundation.units import GIB
from planner.hardware.catalog import load_network
from planner.hardware.cluster import ClusterSpec
from planner.model.attention import Attention
from planner.model.feed_forward import Experts, Mlp
from planner.model.spec import Block, ModelSpec
from planner.model.sublayer import AttentionKernel, Recompute
from planner.model.workload import Method, Optimizer
from planner.strategy.plan import Plan
from planner.strategy.strategy import even_stages

FRAMEWORK = "shardwise"


def plan_columns(plan: Plan) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Columns by name, and remarks on what they cannot hold."""
    degrees, workload = plan.strategy.degrees, plan.workload
    recompute, recompute_remarks = _recompute(plan)
    cluster, cluster_remarks = _cluster_columns(plan.cluster)
    columns = {
        **_model_columns(plan.model),
        **cluster,
        "framework": FRAMEWORK,
        "compile": plan.problem.engine_settings.compiled,
        "precision": str(workload.precision),
        "attention": AttentionKernel.FLASH,
        "seq_len": workload.seq,
        "global_batch": workload.batch,
        "tp": degrees.tp,
        "pp": degrees.pp,
        "chunks": degrees.chunks,
        "schedule": str(degrees.schedule) if degrees.pp > 1 else "",
        "dp": degrees.dp,
        "dp_replicate": degrees.dp_replicate,
        "cp": degrees.cp,
        "ep": degrees.ep,
        "zero": int(degrees.zero),
        "sequence_parallel": degrees.sequence_parallel,
        "micro_batch": degrees.micro_batch,
        "recompute": recompute,
    }
    notes = [] if workload.optimizer is Optimizer.ADAMW else [f"optimizer {workload.optimizer}"]
    if workload.method is not Method.PRETRAIN:
        notes.append("LoRA" if workload.method is Method.LORA else "fine-tuned")
    columns["notes"] = "; ".join(notes)
    uneven = _layers(plan) != [stage.layers for stage in even_stages(plan.model.layers, degrees.stages)]
    stages = ("its stages are uneven, and a row of runs.csv has even ones",) if uneven else ()
    return columns, (*recompute_remarks, *cluster_remarks, *stages)


def _layers(plan: Plan) -> list[int]:
    return [stage.layers for stage in plan.strategy.stages]


def _recompute(plan: Plan) -> tuple[str, tuple[str, ...]]:
    """The option of most blocks, and a remark where not all have it."""
    options = [option for stage in plan.strategy.stages for option in stage.recompute.options()]
    most = max(Recompute, key=options.count)
    others = len(options) - options.count(most)
    if not others:
        return str(most), ()
    return str(most), (f"{others} of {len(options)} blocks recompute otherwise; the row says {most} for all",)


def _model_columns(model: ModelSpec) -> dict[str, Any]:
    """The model's name and the dimensions that columns can state."""
    found: dict[str, Any] = {
        "model": model.name,
        "layers": model.layers,
        "hidden": model.hidden,
        "vocab": model.vocab or None,
        "tied_embeddings": model.tied_embeddings,
    }
    block = next(model.transformer_blocks(), None)
    if block is None:
        return found
    found |= _mlp_columns(block)
    if isinstance(block.mixer, Attention):
        found |= {"heads": block.mixer.heads, "kv_heads": block.mixer.kv_heads}
    return found


def _mlp_columns(block: Block) -> dict[str, Any]:
    if isinstance(block.mlp, Mlp):
        return {"ffn": block.mlp.width, "gated_mlp": block.mlp.gated}
    if isinstance(block.mlp, Experts):
        experts = block.mlp
        return {
            "experts": experts.count,
            "topk": experts.topk,
            "expert_ffn": experts.expert.width,
            "gated_mlp": experts.expert.gated,
        }
    return {}


def _cluster_columns(cluster: ClusterSpec) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Device, nodes and network of a cluster of equal nodes."""
    group = cluster.groups[0]
    found: dict[str, Any] = {
        "device": group.device.name,
        "nodes": sum(each.nodes for each in cluster.groups),
        "gpus_per_node": group.devices_per_node,
        "network": _network(cluster),
    }
    kinds = {(each.device.name, each.devices_per_node) for each in cluster.groups}
    remarks = ("its nodes differ, and a row of runs.csv has one kind of them",) if len(kinds) > 1 else ()
    return found, remarks


def _network(cluster: ClusterSpec) -> str:
    """The network's name where the catalog can read it."""
    try:
        return load_network(cluster.inter.name).name
    except InputError:
        return ""


def rehearsed_run(plan: Plan) -> Run:
    """The row. It has no step time: a rank alone does not wait for others.

    Raises InputError where ranks of some kinds were not rehearsed, so that the plan's peak is not known.
    """
    done = plan.rehearsal
    assert done is not None, "the plan was rehearsed"
    if not done.complete and not done.ran_out:
        raise InputError(
            Problem(
                where="--runs",
                fault="is for a whole plan, and only some kinds of its ranks were rehearsed.",
                fix="leave out --rank and --stages",
            )
        )
    columns, remarks = plan_columns(plan)
    peaks = [rank.allocated_bytes for rank in done.ranks if rank.allocated_bytes is not None]
    reserved = [rank.reserved_bytes for rank in done.ranks if rank.reserved_bytes is not None]
    oom = done.ran_out
    notes = [columns.pop("notes"), f"rehearsed on {done.mode}, torch {done.versions['torch']}", *remarks]
    known = not oom and bool(peaks)
    return Run(
        **{**columns, "compile": done.compiled},
        id=f"rehearsed-{_digest(plan.workload, 6)}-{_digest(plan.strategy, 12)}",
        where="plan rehearse",
        group=f"rehearsed-{plan.model.name}",
        source="plan rehearse",
        status=Status.OOM if oom else Status.OK,
        peak_memory_gib=max(peaks) / GIB if known else None,
        memory_kind=MemoryKind.ALLOCATED if known else None,
        peak_reserved_gib=max(reserved) / GIB if known and reserved else None,
        notes="; ".join(note for note in notes if note),
    )


def _digest(value: Any, places: int) -> str:
    return digest(value).removeprefix("sha256:")[:places]
