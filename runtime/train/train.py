"""Training: the launch of all ranks of a plan.

`run_training` forks the ranks on this machine, or is itself a rank where torchrun started it (RANK and
WORLD_SIZE are in the environment). `python -m runtime.train PLAN ...` takes the arguments of `plan
train`.

The training loop of one rank.

Of a step only what belongs to it is timed: from the tokens in hand to the end of the update, with every
rank starting together. The slowest rank's time counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from planner.foundation.decode import encode
from planner.foundation.run_files import CHECKPOINTS
from planner.strategy.plan import Plan
from planner.strategy.plan_check import check_sound
from runtime.checkpoint.checkpoint import CheckpointSaver
from runtime.checkpoint.huggingface import AdapterFolder, export_adapters
from runtime.checkpoint.store import plan_facts
from runtime.launch.local_ranks import RunFailedError, Send, run_local
from runtime.launch.process_group import (
    HangReporter,
    enter_group,
    group_timeout_s,
    run_collectively,
    started_as_rank,
)
from runtime.parallel.recompute import compiles, run_eagerly
from runtime.train.data.order import BatchReader
from runtime.train.data.prepare import data_summary, data_weights
from runtime.train.executor import Executor, StepResult
from runtime.train.listeners import Audience
from runtime.train.metrics import (
    MetricsLog,
    Seen,
    StepMetrics,
    TrainSummary,
    mean_causes,
    mfu,
    summarize,
    write_summary,
)
from runtime.train.optimizer import OptimizerOptions, learning_rate
from runtime.train.options import TrainOptions, resolve
from runtime.train.recorder import Probes, Recorder
from runtime.train.session import (
    Setup,
    check_fits_here,
    check_same_devices,
    check_world,
    load_into,
    load_resumed,
    lock_run_dir,
    open_run_data,
    pick_device,
    prepare_run,
    restore,
    run_identity,
    saved_options,
    training_state,
)
from runtime.train.transformers_backend import backend_of
from runtime.train.transformers_backend import load_into as load_their_names

ADAPTER = "adapter"
"""The folder of a run that holds its adapters in PEFT's format."""

PACE_STEPS = 100
"""The time that is left is told by the median of so many timed steps."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank of a launch is told."""

    plan: Plan
    options: TrainOptions
    setup: Setup
    launched_s: float


def catch_sigterm() -> Callable[[], bool]:
    """From now on SIGTERM only asks for an end; says whether it came."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    signal.signal(signal.SIGTERM, note)
    return lambda: bool(seen)


def train_rank(job: Job, device: torch.device, send: Send, stop: Callable[[], bool]) -> None:
    """One rank of a run, from its first to its last step. Every rank of the plan's world calls it.

    `stop` is asked once a step whether to save and end.
    """
    _Loop(job, device, send, stop).run()


class _Loop:
    """The state of one rank's loop. Rank 0 also writes the run's files and speaks to the parent."""

    def __init__(self, job: Job, device: torch.device, send: Send, stop: Callable[[], bool]) -> None:
        self.job, self.device, self.stop = job, device, stop
        self.first = dist.get_rank() == 0
        self.send: Send = send if self.first else lambda _: None
        self.run_dir = Path(job.options.run_dir)
        plan, options = job.plan, job.options
        data = open_run_data(job.setup, verify=self.first)
        self.data_text = data_summary(data.index, document_mask=options.document_mask)
        self.reader = BatchReader(
            data=data,
            seed=options.seed,
            seq=plan.workload.seq,
            batch=plan.workload.batch,
            weights=data_weights(options.data),
        )
        self.identity = run_identity(plan, options, data.index)
        self.saver = CheckpointSaver(
            self.run_dir / CHECKPOINTS,
            keep=options.keep,
            background=not options.sync_checkpoints,
            device=device,
        )
        self.told_s = 0.0
        self.optimizer = self._start()
        self.seen = Seen(first_step=self.executor.steps_done)
        count = max(0, options.steps - self.executor.steps_done)
        probes = Probes.over(count, profile_steps=options.profile_steps, snapshot=options.memory_snapshot)
        if options.profile_steps > len(probes.profile):
            fault = f"only {len(probes.profile)} of {options.profile_steps} steps are profiled"
            self.send({"say": f"{fault}: the launch has {count}, and the first {probes.timed_from} warm up"})
        self.recorder = Recorder(probes, self.executor.pipeline.record, device, self.run_dir)

    def _start(self) -> OptimizerOptions:
        """Builds the executor, and fills it where the run goes on."""
        plan, options = self.job.plan, self.job.options
        resumed = load_resumed(self.job.setup)
        saved = None
        if resumed is not None:
            saved = saved_options(resumed[1])
        chosen = resolve(options, plan, saved)
        for remark in self.job.setup.remarks:
            self.send({"say": remark})
        self.compiled = compiles(options.compile, self.device)
        if eager := run_eagerly(plan, compiled=self.compiled):
            self.send({"say": eager})
        self.executor = Executor(
            plan,
            device=self.device,
            seed=options.seed,
            optimizer_options=chosen,
            backend=backend_of(options),
            lora_alpha=options.lora_alpha,
            compiled=self.compiled,
        )
        if options.init_from is not None:
            fill = load_into if options.hf_config is None else load_their_names
            fill(self.executor, Path(options.init_from))
            self.send({"say": f"weights from {options.init_from}"})
        if options.adapters_from is not None:
            source = AdapterFolder(Path(options.adapters_from), plan, alpha=options.lora_alpha)
            source.fill(self.executor.weight_tensors())
            self.executor.weights_filled()
            self.send({"say": f"adapters from {options.adapters_from}"})
        if resumed is not None:
            restore(*resumed, self.executor, chosen)
            self._say_resumed(resumed[1].step, resumed[1].run, saved, chosen)
        return chosen

    def _say_resumed(
        self, step: int, run: Mapping[str, Any], saved: OptimizerOptions | None, chosen: OptimizerOptions
    ) -> None:
        self.send({"say": f"resumed from step {step}"})
        now = plan_facts(self.job.plan)
        if run.get("plan.digest") != now["plan.digest"]:
            self.send({"say": f"the checkpoint's plan was {run.get('plan.label')}, now {now['plan.label']}"})
        if saved is not None and saved != chosen:
            before, after = encode(saved), encode(chosen)
            changes = [
                f"{name} {before[name]} -> {after[name]}" for name in after if before[name] != after[name]
            ]
            self.send({"say": "settings changed: " + ", ".join(changes)})

    def run(self) -> None:
        """All steps, the checkpoints between and at the end, and the summary."""
        log = MetricsLog(self.run_dir, last_step=self.executor.steps_done) if self.first else None
        if log is not None:
            self.seen.earlier, self.seen.steps_s = log.earlier, log.earlier.steps_s
        try:
            self._steps(log)
        finally:
            if log is not None:
                log.close()
        self._finish()

    def _steps(self, log: MetricsLog | None) -> None:
        options, executor = self.job.options, self.executor
        saved_at = -1
        for offset in range(options.steps - executor.steps_done):
            step = executor.steps_done
            results: list[StepResult] = []
            take = functools.partial(self._step, self._batch(step), results)
            if self.recorder.probes.recorded(offset):
                self.saver.wait()  # the copy that is being written is no part of a step
            own_s = self.recorder.run(offset, take)
            result = results[0]
            stopping = self._record(offset, step, result, own_s, log)
            if not math.isfinite(result.loss) or not (result.skipped or math.isfinite(result.grad_norm)):
                fault = f"the loss is {result.loss} and the gradient norm {result.grad_norm}"
                self._diverged(step + 1, fault)
            if result.exhausted:
                self._diverged(step + 1, "gradients overflow fp16 at every loss scale")
            done = executor.steps_done
            every = options.checkpoint_every
            if stopping or done == options.steps or (every and done % every == 0):
                self._save()
                saved_at = done
            if stopping:
                self.saver.wait()
                self.seen.status = "stopped" if done < options.steps else "finished"
                self.send({"say": f"stopped by SIGTERM after step {done}; checkpoint saved"})
                break
        assert saved_at == executor.steps_done

    def _batch(self, step: int) -> tuple[torch.Tensor | None, ...]:
        """This rank's tokens, which of them are trained on where not all are, and with a document mask where
        each one's document begins."""
        place = {"data_rank": self.executor.data_rank, "data_size": self.executor.data_size}
        trained = self.reader.trained(step, **place)
        begins = self.reader.begins(step, **place) if self.job.options.document_mask else None
        found = (self.reader.rows(step, **place), trained, begins)
        return tuple(None if array is None else torch.from_numpy(array) for array in found)

    def _step(self, batch: Any, results: list[StepResult]) -> None:
        results.append(self.executor.step(*batch))

    def _record(
        self, offset: int, step: int, result: StepResult, own_s: float, log: MetricsLog | None
    ) -> bool:
        """Writes the step's line; whether any rank was asked to stop.

        Raises on every rank what the save that runs behind the steps has failed of.
        """
        facts_of_rank = (own_s, self.recorder.peak_bytes, self.stop(), self.saver.failed)
        own = torch.tensor([float(fact) for fact in facts_of_rank], dtype=torch.float64).to(self.device)
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own)
        facts = [row.tolist() for row in rows]
        step_time_s = max(fact[0] for fact in facts)
        self.seen.causes = causes = tuple(self.recorder.causes)
        line = StepMetrics(
            step=step + 1,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=learning_rate(self.optimizer, step),
            step_time_s=step_time_s,
            tokens_per_s=self.job.plan.workload.tokens_per_step / step_time_s,
            mfu=mfu(self.job.plan, step_time_s),
            peak_memory_bytes=tuple(int(fact[1]) for fact in facts),
            timed=self.recorder.probes.timed(offset),
            wall_s=(wall_s := self._wall_s()),
            loss_scale=result.loss_scale,
            skipped=result.skipped,
            checkpoint_wait_s=self.saver.waited_s - self.told_s,
            predicted_step_time_s=self.job.plan.estimate.step_time_s,
            left_s=(left_s := self._left_s(step_time_s, step + 1)),
            cost_usd=self.seen.cost_usd(self.job.plan, wall_s),
            expected_cost_usd=self.seen.cost_usd(self.job.plan, wall_s + left_s),
            predicted_cost_usd=self.seen.predicted_cost_usd(self.job.plan, offset + 1),
            causes=mean_causes(causes) if offset == self.recorder.probes.timeline else None,
        )
        self.told_s = self.saver.waited_s
        if log is not None:
            log.write(line)
            self.send({"step": encode(line)})
        self.seen.note(line)
        if any(fact[3] for fact in facts):
            self.saver.wait()
        return any(fact[2] for fact in facts)

    def _save(self) -> None:
        self.saver.save(
            training_state(self.executor, self.optimizer),
            step=self.executor.steps_done,
            run={**self.identity, **plan_facts(self.job.plan)},
        )

    def _diverged(self, step: int, fault: str) -> None:
        """Ends a run whose loss or gradient is no number: what was saved stays, nothing is saved now."""
        self.seen.status = "diverged"
        self.saver.wait()
        if self.first:
            write_summary(self.run_dir, self._summary())
        kept = self.saver.published or self.job.setup.checkpoint
        raise RunFailedError(
            f"{fault} at step {step}. "
            + (f"The checkpoint {kept} is kept. " if kept else "No checkpoint was saved yet. ")
            + f"The learning rate was {learning_rate(self.optimizer, step - 1):.3g}: try a lower --lr or a "
            "longer --warmup."
        )

    def _finish(self) -> None:
        self.saver.wait()
        executed, plan = self.executor.executed(), self.job.plan
        self.seen.executed = {**encode(executed), "compiled": self.compiled}
        self.seen.executed_differences = executed.differences(plan)
        if self.first:
            published = self.saver.published
            if plan.workload.adapters is not None and published is not None:
                folder, alpha = self.run_dir / ADAPTER, self.job.options.lora_alpha
                self.send({"say": export_adapters(published, plan, folder, alpha=alpha)})
            summary = self._summary()
            write_summary(self.run_dir, summary)
            self.send({"summary": encode(summary)})
        dist.barrier()

    def _summary(self) -> TrainSummary:
        self.seen.checkpoint = None if self.saver.published is None else str(self.saver.published)
        self.seen.checkpoint_wait_s = self.saver.waited_s
        done = self.executor.steps_done
        left_s = self._left_s(self.job.plan.estimate.step_time_s, done)
        return summarize(self.job.plan, self.seen, wall_s=self._wall_s(), left_s=left_s, data=self.data_text)

    def _left_s(self, step_time_s: float, done: int) -> float:
        """Seconds that the steps after `done` take at this launch's pace."""
        return self._pace_s(step_time_s) * max(0, self.job.options.steps - done)

    def _pace_s(self, step_time_s: float) -> float:
        """Seconds of a step: the median of those timed so far, or the last one before any is timed."""
        return statistics.median(self.seen.timed_s[-PACE_STEPS:]) if self.seen.timed_s else step_time_s

    def _wall_s(self) -> float:
        """Seconds of the run so far, all launches together."""
        return self.seen.earlier.wall_s + time.monotonic() - self.job.launched_s


def run_training(plan: Plan, options: TrainOptions, *, shown: bool = True) -> TrainSummary | None:
    """Trains `plan` on real ranks and returns the summary, which is also in the run's folder.

    Under torchrun this process is one rank, and only rank 0 returns a summary. Otherwise it forks all
    ranks here; no process is left when it returns or raises. Raises InputError for wrong input,
    RunFailedError where a rank died or the loss was not finite.
    """
    started_s = time.monotonic()
    check_sound(plan)
    device = pick_device(plan)
    if not options.any_device:
        check_same_devices(plan, device)
    if started_as_rank():
        return _run_as_rank(plan, options, device, started_s, shown=shown)
    check_fits_here(plan, device)
    lock = lock_run_dir(Path(options.run_dir))
    try:
        job = Job(plan, options, prepare_run(plan, options), started_s)
        return _run_forked(job, device, shown=shown)
    finally:
        os.close(lock)


def _run_forked(job: Job, device: str, *, shown: bool) -> TrainSummary:
    options = job.options

    timeout_s = options.hang_timeout or group_timeout_s(job.plan)

    def body(rank: int, send: Send) -> None:
        stop = catch_sigterm()
        train_rank(job, enter_group(device, timeout_s), send, stop)

    with Audience(job.plan, options, shown=shown) as audience:
        run_local(
            body,
            job.plan.strategy.degrees.world,
            log_dir=Path(options.run_dir) / "logs",
            on_message=lambda _, message: audience.receive(message),
        )
        return audience.summary()


def _run_as_rank(
    plan: Plan, options: TrainOptions, device: str, started_s: float, *, shown: bool
) -> TrainSummary | None:
    """This process as one rank under torchrun; rank 0 sets the run up and shows its progress."""
    check_world(plan, int(os.environ["WORLD_SIZE"]))
    stop = catch_sigterm()
    timeout_s = options.hang_timeout or group_timeout_s(plan)
    place = enter_group(device, timeout_s)
    hangs = HangReporter(timeout_s)
    first = dist.get_rank() == 0
    locks: list[int] = []

    def set_up() -> dict[str, Any]:
        locks.append(lock_run_dir(Path(options.run_dir)))
        return dataclasses.asdict(prepare_run(plan, options))

    facts = run_collectively(set_up, first_only=True)[0]
    job = Job(plan, options, Setup(**{**facts, "remarks": tuple(facts["remarks"])}), started_s)
    try:
        with Audience(plan, options, shown=shown and first) as audience:
            train_rank(job, place, audience.receive, stop)
    except RuntimeError as error:
        meaning = hangs.explain(str(error))
        if meaning is None:
            raise
        raise RunFailedError(meaning) from error
    dist.destroy_process_group()
    return audience.summary() if first else None
