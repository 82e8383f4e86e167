"""Executes the plan's own schedule table: every action in its order, and nothing else.

With pp > 1, torch.distributed.pipelining adds the sends and receives to the table and runs it. With
pp = 1 the row is run directly. Both leave a record of what was really done.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _batch_p2p, _PipelineScheduleRuntime

from planner.cost.schedule import Action, ActionKind, parse_table
from planner.plan import Plan
from planner.strategy import CpExchange, Zero
from runtime.parallel.context import ContextCore
from runtime.parallel.data import reduces_gradients, set_gradient_sync
from runtime.parallel.meshes import Meshes
from runtime.precision import compute_dtype
from runtime.transformer.model import Transformer


@dataclass
class Record:
    """What a rank did in its last step: its actions, and whether each backward reduced gradients.

    `exchanges` are the attentions over a sequence that ranks share out: how, and among how many.
    `spans` has the name, begin and end of each action and part of the step, if `clock` is set. It is set
    for one step of a run; on CUDA it waits for the device, so that step is slower than others.
    """

    actions: list[Action] = field(default_factory=list)
    reduced: list[bool] = field(default_factory=list)
    exchanges: list[tuple[CpExchange, int]] = field(default_factory=list)
    clock: Callable[[], float] | None = None
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def span(self, name: str | None = None) -> Iterator[None]:
        """Notes how long the body takes, under `name` or as the last action."""
        if self.clock is None:
            yield
            return
        begin = self.clock()
        yield
        self.spans.append((name or str(self.actions[-1]), begin, self.clock()))

    def clear(self) -> None:
        self.actions.clear()
        self.reduced.clear()
        self.exchanges.clear()
        self.spans.clear()


class StageModule(nn.Module):
    """A stage as pipelining sees it, with a record of what it did in the last step.

    It hides the FSDP root inside it: pipelining's own handling of FSDP would gather whole stages and
    reduce gradients once a step, whatever the ZeRO stage. Left alone, FSDP's hooks work as they do
    without a pipeline, and `before_backward` sets the ZeRO stage's flags for each backward pass.
    """

    def __init__(self, model: Transformer, index: int, zero: Zero, record: Record) -> None:
        super().__init__()
        self.model, self.index, self.zero, self.record = model, index, zero, record
        self.hidden_shape: tuple[int, ...] | None = None
        self.targets: Sequence[Tensor] = ()
        self._micro_batch = 0
        for layer in list(model.layers.values())[:1]:
            layer.register_forward_pre_hook(self._see_hidden)
        for part in model.modules():
            if isinstance(part, ContextCore):
                part.register_forward_pre_hook(self._see_exchange)

    def _see_hidden(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.hidden_shape = tuple(args[0].shape)

    def _see_exchange(self, core: nn.Module, _args: tuple[Any, ...]) -> None:
        assert isinstance(core, ContextCore)
        self.record.exchanges.append((core.exchange, core.ranks))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x, self.targets[self._micro_batch]) if self.targets else self.model(x)
        return out

    def before_forward(self, micro_batch: int) -> None:
        self._micro_batch = micro_batch
        self.record.actions.append(Action(self.index, ActionKind.FORWARD, micro_batch))

    def before_backward(self, micro_batch: int, *, last: bool) -> None:
        set_gradient_sync(self.model, self.zero, last=last)
        self.record.actions.append(Action(self.index, ActionKind.BACKWARD, micro_batch))
        self.record.reduced.append(reduces_gradients(self.model))


class PlanStage(PipelineStage):
    """A pipeline stage that keeps a micro-batch's buffers only as long as the schedule needs them.

    torch's own stage holds a receive buffer for every micro-batch and every sent tensor until the step's
    end, which would undo 1F1B's bound on what is alive.
    """

    def __init__(
        self, module: StageModule, plan: Plan, *, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        stages = plan.strategy.degrees.stages
        inputs, outputs = _boundary_examples(plan, module.index)
        super().__init__(module, module.index, stages, device, inputs, outputs, group=group)
        self.module = module
        self._hidden_shape, self._hidden_dtype = hidden_shape(plan), hidden_dtype(plan)
        self._sent_forward: dict[int, list[dist.Work]] = {}
        self._sent_backward: dict[int, list[dist.Work]] = {}
        self._received_before = _backwards_before(plan, module.index - 1) if module.index else {}

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        # The stage before has sent this activation, so it has received the gradients that its row asks
        # for earlier: these waits return at once.
        for micro_batch in self._received_before.get(fwd_chunk_id, ()):
            _wait(self._sent_backward.pop(micro_batch, []))
        self.module.before_forward(fwd_chunk_id)
        with self.module.record.span():
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        # The gradient has come back, so the activation was received: this wait returns at once.
        _wait(self._sent_forward.pop(bwd_chunk_id, []))
        self.module.before_backward(bwd_chunk_id, last=last_backward)
        with self.module.record.span():
            result = super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._drop(self.args_recv_info, bwd_chunk_id)
        self._drop(self.grad_recv_info, bwd_chunk_id)
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.args_recv_info, fwd_chunk_id)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.grad_recv_info, bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Sends here, so that the handle (which keeps the tensor) can go before the step ends."""
        self._sent_forward[fwd_chunk_id] = _batch_p2p(super().get_fwd_send_ops(fwd_chunk_id))
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As `get_fwd_send_ops`."""
        self._sent_backward[bwd_chunk_id] = _batch_p2p(super().get_bwd_send_ops(bwd_chunk_id))
        return []

    def finish(self) -> None:
        """Waits for what is still being sent at the step's end."""
        for sent in (self._sent_forward, self._sent_backward):
            for works in sent.values():
                _wait(works)
            sent.clear()

    def clear_runtime_states(self) -> None:
        self.fwd_cache.clear()
        self.output_chunks.clear()

    def _prepare_forward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(num_microbatches, *args, **kwargs)
        for chunk in range(num_microbatches):
            self._drop(self.args_recv_info, chunk)
        return result

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(num_microbatches, *args, **kwargs)
        for chunk in range(num_microbatches):
            self._drop(self.grad_recv_info, chunk)
        return result

    def _allocate(self, infos: dict[int, Any], chunk: int) -> None:
        for info in _received(infos[chunk]):
            info.buffer = torch.empty(self._hidden_shape, dtype=self._hidden_dtype, device=self.device)

    def _drop(self, infos: dict[int, Any], chunk: int) -> None:
        for info in _received(infos[chunk]):
            info.buffer = None


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _backwards_before(plan: Plan, stage: int) -> dict[int, list[int]]:
    """For each forward of a stage, the micro-batches whose backward is between it and the last one."""
    between: list[int] = []
    found: dict[int, list[int]] = {}
    for action in parse_table(plan.schedule_table)[plan.strategy.degrees.pp_rank_of_stage(stage)]:
        if action.stage == stage and action.kind is ActionKind.BACKWARD:
            between.append(action.micro_batch)
        elif action.stage == stage:
            found[action.micro_batch], between = between, []
    return found


def _received(infos: Sequence[Any]) -> list[Any]:
    """The descriptors of what comes from another stage; a model's own input has no source."""
    return [info for info in infos if getattr(info, "source", None) is not None]


def hidden_shape(plan: Plan) -> tuple[int, int, int]:
    """The hidden states of one micro-batch that one rank holds between parts: [B, S/cp or S/cp/tp, H]."""
    degrees = plan.strategy.degrees
    seq = plan.workload.seq // degrees.cp // (degrees.tp if degrees.sequence_parallel else 1)
    return degrees.micro_batch, seq, plan.model.hidden


def hidden_dtype(plan: Plan) -> torch.dtype:
    """The number format of hidden states."""
    return compute_dtype(plan.workload.precision)


def _boundary_examples(plan: Plan, index: int) -> tuple[Tensor, Tensor]:
    """Input and output of a stage as meta tensors. Given, torch needs no extra pass to find them."""
    degrees, workload = plan.strategy.degrees, plan.workload
    dtype = hidden_dtype(plan)
    tokens = torch.empty(degrees.micro_batch, workload.seq // degrees.cp, dtype=torch.int64, device="meta")
    hidden = torch.empty(hidden_shape(plan), dtype=dtype, device="meta", requires_grad=True)
    last = index == degrees.stages - 1
    loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
    return tokens if index == 0 else hidden, loss if last else hidden


def micro_batch_loss(num_micro_batches: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A micro-batch's part of the step's mean loss, so that gradients add up to the mean's.

    The last stage has been given the targets and returns the micro-batch's mean; torch passes them again.
    """

    def loss(mean: Tensor, _targets: Tensor) -> Tensor:
        return mean / num_micro_batches

    return loss


class Pipeline:
    """This rank's stages and its row of the schedule table."""

    def __init__(self, plan: Plan, modules: Sequence[StageModule], meshes: Meshes, device: torch.device):
        degrees = plan.strategy.degrees
        self.modules = list(modules)
        self.record = modules[0].record
        self.holds_last = modules[-1].index == degrees.stages - 1
        self._num_micro_batches = degrees.num_micro_batches
        self._row = parse_table(plan.schedule_table)[meshes.pp.get_local_rank()]
        self._loss = micro_batch_loss(degrees.num_micro_batches)
        self._schedule = (
            lower_schedule(plan, self.modules, meshes, device, self._loss) if degrees.pp > 1 else None
        )

    def run(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of every micro-batch; the mean loss here, 0 without the last stage."""
        self.record.clear()
        if self.holds_last:
            self.modules[-1].targets = targets.chunk(self._num_micro_batches)
        with warnings.catch_warnings():
            # The embedding's output is a view of a DTensor; nothing in the model writes to it in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            # torch.compile looks whether a block's input has one, each time it compiles.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            if self._schedule is None:
                return self._run_row(inputs, targets)
            return self._run_schedule(self._schedule, inputs, targets)

    def _run_schedule(self, schedule: _PipelineScheduleRuntime, inputs: Tensor, targets: Tensor) -> Tensor:
        losses: list[Tensor] = []
        args = (inputs,) if self.modules[0].index == 0 else ()
        if self.holds_last:
            schedule.step(*args, target=targets, losses=losses, return_outputs=False)
        else:
            schedule.step(*args, return_outputs=False)
        for stage in schedule._stages:
            if isinstance(stage, PlanStage):
                stage.finish()
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else _zero(inputs)

    def _run_row(self, inputs: Tensor, targets: Tensor) -> Tensor:
        module = self.modules[0]
        input_chunks = inputs.chunk(self._num_micro_batches)
        alive: dict[int, Tensor] = {}
        total = _zero(inputs)
        for place, action in enumerate(self._row):
            mb = action.micro_batch
            if action.kind is ActionKind.FORWARD:
                module.before_forward(mb)
                with self.record.span():
                    alive[mb] = self._loss(module(input_chunks[mb]), targets)
            else:
                module.before_backward(mb, last=place == len(self._row) - 1)
                loss = alive.pop(mb)
                with self.record.span():
                    torch.autograd.backward(loss)
                total += loss.detach()
        return total


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=like.device)


def lower_schedule(
    plan: Plan,
    modules: Sequence[StageModule],
    meshes: Meshes,
    device: torch.device,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> _PipelineScheduleRuntime:
    """torch's runtime loaded with the plan's table, lowered to sends and receives by torch."""
    group = meshes.pp.get_group()
    stages = [PlanStage(module, plan, device=device, group=group) for module in modules]
    make: Callable[..., _PipelineScheduleRuntime] = _PipelineScheduleRuntime
    schedule = make(stages, plan.strategy.degrees.num_micro_batches, loss_fn=loss, scale_grads=False)
    table = {
        rank: [_Action.from_str(str(action)) for action in row]
        for rank, row in enumerate(parse_table(plan.schedule_table))
    }
    schedule.pipeline_order = table
    schedule._prepare_schedule_with_comms(table)
    return schedule
