"""The set-up of a run: its folder, its data, whose run it is, and where it goes on.

Keeps the plan of a run in its folder, and those of earlier launches beside it.

Where a run stands, read from its folder without torch and without changing anything there.

Whether the devices of this machine are those that a plan was made for.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.foundation.decode import encode, load_json, to_json, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.run_files import CHECKPOINTS, EARLIER, LOCK, OPTIONS, PLAN, SUMMARY, TIMELINE
from planner.foundation.units import format_bytes
from planner.hardware.catalog import device_reported_as
from planner.hardware.local_machine import accelerators, cpu_title, physical_memory_bytes
from planner.profile.choose import release
from planner.strategy.plan import Plan, load_plan, predicted_memory_by_rank, save_plan
from runtime.checkpoint.checkpoint import load_checkpoint
from runtime.checkpoint.huggingface import AdapterFolder, check_folder, keep_files
from runtime.checkpoint.store import (
    CheckpointIndex,
    Value,
    check_identity,
    find_checkpoint,
    load_index,
    plan_identity,
    remove_unfinished,
    set_aside,
    step_folder,
    step_folders,
)
from runtime.launch.process_group import own_rank
from runtime.model.huggingface.files import WeightFolder
from runtime.train.data.order import shares
from runtime.train.data.prepare import DataIndex, data_weights, open_data, prepare_data
from runtime.train.executor import Executor
from runtime.train.listeners import check_trackers
from runtime.train.metrics import prepare_run_dir
from runtime.train.optimizer import OptimizerOptions
from runtime.train.options import TrainOptions, check_options
from runtime.train.transformers_backend import check_backend

ANYWAY = "run it anyway with --any-device; what was predicted will not hold"


def pick_device(plan: Plan) -> str:
    """`cpu` or `cuda`, as the plan's devices are. Raises InputError where this machine has none."""
    names = {group.device.name for group in plan.cluster.groups}
    if names == {"cpu"}:
        return "cpu"
    # The count comes from the driver's library and leaves CUDA alone, so forking stays possible.
    if torch.cuda.device_count() == 0:
        raise InputError(
            Problem(
                where="cluster",
                fault=f"the plan is for {', '.join(sorted(names))}; this machine has no CUDA device.",
                fix="run it there, or solve again with --cluster local:4 for processes on this CPU",
            )
        )
    return "cuda"


def check_same_devices(plan: Plan, device: str) -> None:
    """Raises InputError where this machine's devices are of another kind, or too small for the plan."""
    if device == "cuda":
        _check_accelerators(plan)
    else:
        _check_memory(plan)


def _check_accelerators(plan: Plan) -> None:
    planned = sorted({group.device.name for group in plan.cluster.groups})
    here = sorted({_catalog_name(reported) for reported, _ in accelerators()})
    foreign = [name for name in here if name not in planned]
    if foreign:
        raise InputError(
            Problem(
                where="cluster",
                fault=f"the plan is for {', '.join(planned)}; this machine has {', '.join(foreign)}.",
                fix=f"solve again with --cluster local, or {ANYWAY}",
            )
        )


def _catalog_name(reported: str) -> str:
    """How plans call the device that the driver calls `reported`, as `planner.hardware.local_machine` names
    it."""
    known = device_reported_as(reported)
    return "-".join(reported.lower().split()) if known is None else known.device().name


def _check_memory(plan: Plan) -> None:
    needed, here = sum(predicted_memory_by_rank(plan)), physical_memory_bytes()
    if needed > here:
        raise InputError(
            Problem(
                where="cluster",
                fault=f"all ranks of the plan are predicted to hold {format_bytes(needed)} together; "
                f"this machine has {format_bytes(here)}.",
                fix=f"solve again with --cluster local here, or {ANYWAY}",
            )
        )


def foreign_cpu(plan: Plan) -> str | None:
    """A remark where a plan for processes on one kind of CPU runs on another."""
    title = plan.cluster.groups[0].device.title
    if plan.cluster.groups[0].device.name != "cpu" or title == cpu_title():
        return None
    return f"the plan was made for processes on {title}, this is {cpu_title()}: times will differ"


def foreign_torch(plan: Plan) -> str | None:
    """A remark where the plan's figures were measured with another release of torch than runs it."""
    here = torch.__version__
    taken = [use.torch for use in plan.profiles if use.torch and release(use.torch) != release(here)]
    if not taken:
        return None
    return f"the plan's profile was taken with torch {', '.join(taken)}, this is {here}: times may differ"


def check_world(plan: Plan, world: int) -> None:
    """Raises InputError where torchrun started another number of ranks than the plan needs."""
    needed = plan.strategy.degrees.world
    if world != needed:
        raise InputError(
            Problem(
                where="WORLD_SIZE",
                fault=f"torchrun started {world} ranks, but the plan ({plan.strategy.degrees.label()}) "
                f"needs {needed}.",
                legal=str(needed),
                fix=f"start {needed} ranks, or solve again for {world} devices",
            )
        )


def check_fits_here(plan: Plan, device: str) -> None:
    """Raises InputError where the plan needs more devices than this one machine has."""
    needed = plan.strategy.degrees.world
    here = torch.cuda.device_count() if device == "cuda" else needed
    if here < needed:
        raise InputError(
            Problem(
                where="cluster",
                fault=f"the plan needs {needed} devices; this machine has {here}.",
                fix="start it on every node: torchrun --nnodes N --nproc-per-node "
                f"{plan.cluster.devices_per_node} --rdzv-endpoint HOST:PORT -m runtime.train PLAN ...",
            )
        )


def keep_plan(plan: Plan, run_dir: Path, step: int) -> None:
    """Makes `plan` the run's from `step` on. What is there of another plan goes to EARLIER.

    A plan that led to no step that counts, since it left no checkpoint of its own, is not kept.
    """
    path = run_dir / PLAN
    if path.exists():
        if load_plan(path) == plan:
            return
        _set_aside(run_dir, step_folder(run_dir / EARLIER, step), led_nowhere=step == 0)
    save_plan(plan, path)


def _set_aside(run_dir: Path, earlier: Path, *, led_nowhere: bool) -> None:
    """Moves what is about the plan before; its plan.json last, which says that the folder is whole."""
    dropped = led_nowhere or (earlier / PLAN).exists()
    if not dropped:
        earlier.mkdir(parents=True, exist_ok=True)
    for name in (SUMMARY, TIMELINE, PLAN):
        if dropped:
            (run_dir / name).unlink(missing_ok=True)
        elif (run_dir / name).exists():
            (run_dir / name).replace(earlier / name)


@dataclass(frozen=True, slots=True)
class Setup:
    """What one process prepares and all ranks use. `checkpoint` is the step to go on from, if any."""

    index: str
    checkpoint: str | None
    remarks: tuple[str, ...]


def lock_run_dir(run_dir: Path) -> int:
    """Makes the run folder and holds its lock until this process ends; returns the lock's descriptor."""
    prepare_run_dir(run_dir)
    handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise InputError(
            Problem(
                where=f"--run-dir {run_dir}",
                fault="another run is writing there.",
                fix="wait for its end, or name another folder",
            )
        ) from None
    return handle


def prepare_run(plan: Plan, options: TrainOptions) -> Setup:
    """Checks the options, removes unfinished saves, tokenizes the data, and finds the step to go on from.

    Raises InputError where the folder holds a run already and `resume` is not given, or holds none and
    it is.
    """
    check_options(options)
    _check_adapters(plan, options)
    check_trackers(options.log)
    run_dir = Path(options.run_dir)
    folder = run_dir / CHECKPOINTS
    remove_unfinished(folder)
    remarks = [remark for remark in (foreign_cpu(plan), foreign_torch(plan)) if remark is not None]
    checkpoint = None
    if options.resume:
        found = find_checkpoint(folder)
        remarks += [f"passed over: {text}" for text in found.refused]
        if found.path is None:
            raise InputError(
                Problem(
                    where=str(folder),
                    fault="holds no checkpoint to resume from." + "".join(f" {t}" for t in found.refused),
                    fix="restore what is missing, or train into another --run-dir; nothing was deleted"
                    if found.refused
                    else "train without --resume",
                )
            )
        checkpoint = str(found.path)
        remarks += [f"kept aside: {set_aside(path)}" for path in found.damaged]
    elif steps := step_folders(folder):
        raise InputError(
            Problem(
                where=f"--run-dir {run_dir}",
                fault=f"holds a run already ({steps[0].name}).",
                fix="go on with --resume, or name another folder",
            )
        )
    if options.hf_config is not None:
        check_backend(plan, Path(options.hf_config))
    if options.adapters_from is not None:
        _begin_with_adapters(Path(options.adapters_from), plan, options)
    if options.init_from is not None:
        _begin_with(Path(options.init_from), plan, options)
    cache = run_dir / "data" if options.data_cache is None else Path(options.data_cache)
    index = prepare_data(options.data, vocab=plan.model.vocab, cache=cache, borders=options.document_mask)
    done = 0 if checkpoint is None else _check_goes_on(Path(checkpoint), plan, options, index)
    keep_plan(plan, run_dir, done)
    write_atomic(run_dir / OPTIONS, to_json(options))
    return Setup(str(index), checkpoint, tuple(remarks))


def _check_goes_on(checkpoint: Path, plan: Plan, options: TrainOptions, data: Path) -> int:
    """The steps that a checkpoint has done. Raises InputError where it is another run's, or nothing is
    left."""
    index = load_index(checkpoint)
    check_identity(checkpoint, index.run, run_identity(plan, options, load_json(data, DataIndex)))
    if options.steps <= index.step:
        raise InputError(
            Problem(
                where="--steps",
                fault=f"is {options.steps}, and the checkpoint is already at step {index.step}.",
                legal=f"more than {index.step}: steps count from the beginning of training",
            )
        )
    return index.step


def _check_adapters(plan: Plan, options: TrainOptions) -> None:
    if options.lora_alpha is not None and plan.workload.adapters is None:
        raise InputError(
            Problem(
                where="--lora-alpha",
                fault=f"is given, but the plan trains all weights (method {plan.workload.method}).",
                fix="leave it out, or solve with --method lora",
            )
        )


def _begin_with_adapters(folder: Path, plan: Plan, options: TrainOptions) -> None:
    """Checks the folder that a new run takes its adapters from."""
    if options.resume or plan.workload.adapters is None:
        why = "with --resume, which takes them from the run's own checkpoint"
        if plan.workload.adapters is None:
            why = f"but the plan trains all weights (method {plan.workload.method})"
        fault, fix = f"is given, {why}.", "leave it out"
        raise InputError(Problem(where="--adapters-from", fault=fault, fix=fix))
    AdapterFolder(folder, plan, alpha=options.lora_alpha)


def _begin_with(folder: Path, plan: Plan, options: TrainOptions) -> None:
    """Checks the folder that a new run takes its weights from, and keeps what export needs of it.

    A run of adapters takes them from there each time it goes on: its checkpoints do not hold them.
    """
    if options.resume and plan.workload.adapters is None:
        fault = "is given with --resume, which takes the weights from the run's own checkpoint."
        raise InputError(Problem(where="--init-from", fault=fault, fix="give one of the two"))
    if options.hf_config is None:
        check_folder(folder, plan.model)
    keep_files(folder, Path(options.run_dir))


def run_identity(plan: Plan, options: TrainOptions, data: DataIndex) -> dict[str, Value]:
    """What must not change when a run goes on, as flat values: model, workload, data and its order."""
    return {
        **plan_identity(plan),
        "backend": "native" if options.hf_config is None else "transformers",
        "data.digest": data.digest,
        "data.tokenizer": f"{data.tokenizer} {data.tokenizer_digest[:16]}",
        "data.weights": " ".join(map(str, shares(weights)))
        if (weights := data_weights(options.data))
        else "",
        "seed": options.seed,
        **({"document_mask": True} if options.document_mask else {}),
        **({} if plan.workload.adapters is None else {"lora_alpha": options.lora_alpha}),
    }


def saved_options(index: CheckpointIndex) -> OptimizerOptions:
    """The optimizer's settings that a checkpoint keeps."""
    fields = dataclasses.fields(OptimizerOptions)
    values: dict[str, Any] = {field.name: index.values[f"options/{field.name}"] for field in fields}
    return OptimizerOptions(**values)


def training_state(executor: Executor, options: OptimizerOptions) -> dict[str, Any]:
    """All that a run needs to go on exactly: weights, optimizer, step, random state and settings.

    The data's position and the learning rate are functions of the step, the seed and the settings.
    """
    state: dict[str, Any] = {
        "executor": executor.state_dict(),
        "random": {f"rank-{own_rank()}": torch.get_rng_state()},
        "options": encode(options),
    }
    if executor.device.type == "cuda":
        state["random-cuda"] = {f"rank-{own_rank()}": torch.cuda.get_rng_state(executor.device)}
    return state


def restore(path: Path, index: CheckpointIndex, executor: Executor, options: OptimizerOptions) -> None:
    """Loads a checkpoint of any layout of the same model into the executor.

    Random states belong to ranks, so they are taken over only where the number of ranks is the same.
    """
    state = training_state(executor, options)
    del state["options"]
    if (
        index.world != executor.plan.strategy.degrees.world
        or f"random/rank-{own_rank()}" not in index.tensors
    ):
        state.pop("random")
        state.pop("random-cuda", None)
    state = load_checkpoint(path, index, state)
    executor.load_state_dict(state["executor"])
    for rng in state.get("random", {}).values():
        torch.set_rng_state(rng)
    for rng in state.get("random-cuda", {}).values():
        torch.cuda.set_rng_state(rng, executor.device)


def open_run_data(setup: Setup, *, verify: bool) -> Any:
    """The run's tokens; one process of a run verifies their checksum."""
    return open_data(Path(setup.index), verify=verify)


def load_resumed(setup: Setup) -> tuple[Path, CheckpointIndex] | None:
    """The checkpoint to go on from, already verified by the process that set the run up."""
    if setup.checkpoint is None:
        return None
    path = Path(setup.checkpoint)
    return path, load_index(path)


def load_into(executor: Executor, folder: Path) -> None:
    """Fills the weights of this rank from the folder; optimizer and step stay at the beginning."""
    source = WeightFolder(folder, executor.plan.model)
    known = {mapped.name for mapped in source.map.parameters}
    for name, tensor in executor.weight_tensors():
        if name in known:
            source.fill(name, tensor)
    executor.weights_filled()
