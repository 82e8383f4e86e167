"""Executor: trains exactly one plan on the ranks of the running process group."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from planner.foundation.errors import CheckError, InputError, Problem
from planner.model.workload import Precision
from planner.strategy.plan import Plan
from runtime.check.executed_settings import Executed, read_executed
from runtime.model.fp8 import check_fp8
from runtime.model.held_weights import HostWeight, Weight, local_part, on_axis, sum_over
from runtime.model.lora import check_base, fingerprint
from runtime.model.loss import IGNORED
from runtime.model.precision import LossScaler, compute_dtype
from runtime.model.transformer import Borders
from runtime.parallel.context import held_positions
from runtime.parallel.meshes import Meshes, build_meshes, mesh_axes
from runtime.parallel.offload import apart, apply_state_offload, hosted_blocks, send_up
from runtime.parallel.parallelize import Backend, StageModel, build_stage, check_supported
from runtime.parallel.pipeline import Pipeline, Record, StageModule
from runtime.parallel.recompute import WRAPPER_PREFIX, check_compiled_gradients
from runtime.parallel.tensor import copies_of, partial_parameters
from runtime.train.optimizer import (
    Balance,
    OptimizerOptions,
    build_optimizer,
    clip,
    learning_rate,
    weighted_square_sum,
)


@dataclass(frozen=True)
class StepResult:
    """The mean loss of the global batch, and the global gradient norm before clipping.

    `loss_scale` is what fp16 gradients were multiplied by, None in other formats. `skipped` says that they
    were not finite and nothing was updated, `exhausted` that no scale is left to try.
    """

    loss: float
    grad_norm: float
    loss_scale: float | None = None
    skipped: bool = False
    exhausted: bool = False


class Executor:
    """One rank of a plan: its stages, its shards of weights and optimizer, its row of the schedule.

    Every rank of the process group makes one, then calls `step` in step. `meshes` are the plan's, where they
    were made before. The constructor raises InputError where the plan asks for something that this runtime
    cannot do.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: torch.device | str,
        seed: int,
        optimizer_options: OptimizerOptions,
        backend: Backend | None = None,
        lora_alpha: float | None = None,
        compiled: bool = False,
        meshes: Meshes | None = None,
    ) -> None:
        device = torch.device(device)
        check_supported(plan)
        _check_world(plan)
        if plan.workload.precision is Precision.FP8:
            check_fp8(device)
        self.plan, self.options = plan, optimizer_options
        self.meshes = meshes or build_meshes(plan, device.type)
        self.device = device
        _check_averages(self.meshes, device)
        if compiled:
            check_compiled_gradients(plan.strategy.degrees, self.meshes, device)
        build = functools.partial(
            build_stage, plan, meshes=self.meshes, seed=seed, device=device, backend=backend
        )
        self.modules = _build_modules(
            plan, self.meshes, functools.partial(build, lora_alpha=lora_alpha, compiled=compiled)
        )
        cp_rank = self.meshes.cp.get_local_rank()
        self._held = held_positions(plan.workload.seq, plan.strategy.degrees, cp_rank).to(device)
        self._hosted = self._offload_states()
        self.pipeline = Pipeline(plan, self.modules, self.meshes, device)
        held = self._collect_weights()
        self.weights = [weight for weight in held if weight.parameter.requires_grad]
        self.frozen = [weight for weight in held if not weight.parameter.requires_grad]
        self._base = fingerprint(self.frozen, device) if self.frozen else None
        # Beside adapters the whole model stays as it is, else they would be adapters of another one.
        models, frozen = [module.model for module in self.modules], plan.workload.adapters is not None
        self.balance = Balance(plan.model, models, frozen=frozen)
        self.optimizer = build_optimizer(
            plan.workload.optimizer, self.weights, optimizer_options, plan.workload.precision
        )
        self._partial = self._partial_weights()
        self._tied = [weight for weight in self.weights if weight.name == self.modules[0].model.tied_name]
        self._tied_group = self._make_tied_group()
        self.scaler = LossScaler() if plan.workload.precision is Precision.FP16 else None
        self.steps_done = 0

    @property
    def data_rank(self) -> int:
        """Which slice of the global batch this rank reads."""
        world, shards = self.meshes.world, self.plan.strategy.degrees.dp_shard
        return world.get_local_rank("dp_replicate") * shards + world.get_local_rank("dp_shard")

    @property
    def data_size(self) -> int:
        """How many slices the global batch has."""
        return self.plan.strategy.degrees.dp

    def step(self, tokens: Tensor, trained: Tensor | None = None, begins: Tensor | None = None) -> StepResult:
        """One optimizer step on this rank's slice [batch / data_size, seq + 1] of the global batch.

        Position s predicts token s + 1; of the positions this rank computes those that it holds under context
        parallelism. `trained`, of the same shape, is true for tokens that count as targets; the loss is the
        mean over those of the whole global batch. `begins` [batch / data_size, seq], in host memory, says
        where the document of each position begins: attention stays within documents, and positions begin
        anew. The result is the same on every rank.
        """
        workload = self.plan.workload
        assert tokens.shape == (workload.batch // self.data_size, workload.seq + 1), tokens.shape
        tokens = tokens.to(self.device)
        loss_scale = self._set_loss_scale()
        held = self._held
        targets = tokens[:, held + 1]
        if trained is not None:
            targets = self._leave_out(targets, trained.to(self.device))
        loss = self.pipeline.run(tokens[:, held], targets, None if begins is None else Borders(begins))
        record = self.pipeline.record
        with record.span("gradient sums"):
            grads = self._take_gradients()
            mean_loss, scaled_norm = self._reduce(loss, grads)
            norm = scaled_norm / loss_scale
        # An overflow anywhere makes the norm of the whole world infinite or no number on every rank.
        skipped = self.scaler is not None and not math.isfinite(norm)
        with record.span("optimizer"):
            if not skipped:
                clip(grads, norm, self.options.clip_norm, loss_scale)
                self.optimizer.set_learning_rate(learning_rate(self.options, self.steps_done))
                self.optimizer.step()
            self.balance.update()
        for weight in self.weights:
            weight.shard.grad = weight.parameter.grad = None
        self.steps_done += 1
        if self.scaler is None:
            return StepResult(loss=mean_loss, grad_norm=norm)
        self.scaler.update(overflow=skipped)
        return StepResult(mean_loss, norm, loss_scale, skipped, self.scaler.exhausted)

    def _set_loss_scale(self) -> float:
        """Has head and routers multiply the loss's gradients by the scale of this step."""
        scale = 1.0 if self.scaler is None else self.scaler.scale
        for module in self.modules:
            if module.model.output is not None:
                module.model.output.gradient_scale = scale
        self.balance.set_gradient_scale(scale)
        return scale

    def _leave_out(self, targets: Tensor, trained: Tensor) -> Tensor:
        """The targets that this rank holds without those that are not trained on.

        Every micro-batch's sum is divided by the same number, so that a target counts alike wherever it
        lies: targets of the global batch / (micro-batches x ranks that share the batch out).
        """
        degrees = self.plan.strategy.degrees
        counted = trained[:, 1:].sum().double()
        dist.all_reduce(counted)  # every slice of the batch is read by world / dp ranks
        of_batch = counted.item() * degrees.dp / degrees.world
        for module in self.modules:
            head = module.model.output
            if head is not None:
                head.counted = max(of_batch, 1.0) / (degrees.num_micro_batches * degrees.replicas)
        return targets.masked_fill(~trained[:, self._held + 1], IGNORED)

    def _take_gradients(self) -> list[Tensor]:
        """Gives every shard its gradient, complete but for clipping."""
        for weight in self.weights:
            weight.shard.grad = _gradient(weight)
            if weight.gradient_scale != 1:
                weight.shard.grad.mul_(weight.gradient_scale)
        sum_over((w.shard.grad, [group]) for w, group in self._partial if w.shard.grad is not None)
        self._sum_tied()
        return [weight.shard.grad for weight in self.weights if weight.shard.grad is not None]

    def _reduce(self, loss: Tensor, grads: list[Tensor]) -> tuple[float, float]:
        """The mean loss and the gradient norm of the whole world, in one all-reduce.

        Each rank with the last stage adds its loss over (dp * cp * tp); each element of a gradient counts
        once because every copy of it is weighted by its share.
        """
        degrees = self.plan.strategy.degrees
        square_sum = weighted_square_sum(grads, [weight.share for weight in self.weights])
        totals = torch.stack((loss.double() / (degrees.replicas * degrees.tp), square_sum.to(loss.device)))
        dist.all_reduce(totals)
        mean_loss, total = totals.tolist()
        return mean_loss, math.sqrt(total)

    def _collect_weights(self) -> list[Weight]:
        weights = []
        for module in self.modules:
            for name, parameter in module.model.named_parameters():
                clean = name.replace(WRAPPER_PREFIX, "")
                canonical = module.model.global_name(clean)
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                copy = canonical == module.model.tied_name and module.model.tok_embeddings is None
                host = self._hosted.get(parameter)
                weights.append(
                    Weight(
                        name=canonical,
                        path=clean,
                        parameter=parameter,
                        shard=nn.Parameter(local.detach(), parameter.requires_grad)
                        if host is None
                        else host.master,
                        share=0.0 if copy else self._share(parameter),
                        host=host,
                        gradient_scale=self._gradient_scale(parameter),
                    )
                )
        return weights

    def _offload_states(self) -> dict[nn.Parameter, HostWeight]:
        """Moves to host memory the masters of the blocks that the plan says."""
        dtype, stages = compute_dtype(self.plan.workload.precision), self.plan.strategy.stages
        hosted: dict[nn.Parameter, HostWeight] = {}
        for module in self.modules:
            hosted |= apply_state_offload(module.model, stages[module.index], dtype)
        return hosted

    def _share(self, parameter: nn.Parameter) -> float:
        shards = 1
        if isinstance(parameter, DTensor):
            for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
                shards *= 1 if placement.is_replicate() else size
        degrees = self.plan.strategy.degrees
        return shards * degrees.pp / degrees.world

    def _gradient_scale(self, parameter: nn.Parameter) -> float:
        degrees = self.plan.strategy.degrees
        routed = isinstance(parameter, DTensor) and "ep" in mesh_axes(parameter)
        return degrees.expert_replicas / degrees.replicas if routed else 1.0

    def _partial_weights(self) -> list[tuple[Weight, dist.ProcessGroup]]:
        """Weights whose gradient is a partial sum over tp, of adapters the halves that are not split; or over
        the copies of a key-value head."""
        degrees, adapters = self.plan.strategy.degrees, self.plan.workload.adapters
        copied = [(w, copies) for w in self.weights if (copies := copies_of(w.parameter, self.meshes))]
        partial = {id(p) for module in self.modules for p in partial_parameters(module.model, degrees)}
        if adapters is not None:
            apart = {id(w) for w, _ in copied}
            whole = [w for w in self.weights if not on_axis(w.parameter, "tp") and id(w) not in apart]
            partial = {id(w.parameter) for w in whole if degrees.tp > 1}
        summed = [(w, self.meshes.tp) for w in self.weights if id(w.parameter) in partial]
        return [(w, mesh.get_group()) for w, mesh in (*summed, *copied)]

    def _make_tied_group(self) -> dist.ProcessGroup | None:
        """The group of the two ranks that hold a tied embedding's two copies; None where one rank has both.

        Collective: every rank makes every group.
        """
        degrees = self.plan.strategy.degrees
        first, last = degrees.pp_rank_of_stage(0), degrees.pp_rank_of_stage(degrees.stages - 1)
        if not self.plan.model.tied_embeddings or first == last:
            return None
        pairs = zip(degrees.ranks_of_pp_rank(first), degrees.ranks_of_pp_rank(last), strict=True)
        groups = {pair: dist.new_group(list(pair)) for pair in pairs}
        own = [group for pair, group in groups.items() if dist.get_rank() in pair]
        return own[0] if own else None

    def _sum_tied(self) -> None:
        """Gives both copies of a tied embedding the sum of their gradients."""
        grads = [weight.shard.grad for weight in self._tied if weight.shard.grad is not None]
        if self._tied_group is not None:
            sum_over((gradient, [self._tied_group]) for gradient in grads)
        elif len(grads) == 2:
            grads[1].copy_(grads[0].add_(grads[1].to(grads[0].device)))

    def executed(self) -> Executed:
        """What the ranks executed in the last step, read from the running model. Collective."""
        paths = [weight.path for weight in self.weights]
        away = [apart(weight.parameter, weight.shard) for weight in self.weights]
        return read_executed(self.pipeline, self.plan, hosted_blocks(paths, away))

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, optimizer state and step count under flat global names, for distributed checkpoints.
        Frozen weights are not among them, but a fingerprint of them is.

        Sharded tensors are DTensors over this rank's memory, so a checkpoint loads in place and into any
        other layout. `load_state_dict` must follow, for the step count.
        """
        state: dict[str, Tensor] = {"step": torch.tensor(self.steps_done), **dict(self._named_state())}
        if self.scaler is not None:
            state |= {f"loss_scaler.{key}": value for key, value in self.scaler.state_dict().items()}
        if self._base is not None:
            state["base"] = self._base.clone()
        return state

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors of weights and optimizer; two of a name where this rank holds both copies of a tied one."""
        if not self.balance.frozen:
            for name, bias in self.balance.corrections.items():
                yield f"model.{name}", bias
        for weight in self.weights:
            yield f"model.{weight.name}", weight.value
            for key, value in self.optimizer.state_of(weight.shard).items():
                yield f"optimizer.{weight.name}.{key}", weight.state(key, value)

    def weight_tensors(self) -> list[tuple[str, Tensor]]:
        """All weights that this rank holds, frozen ones too, by name, to be filled in place from elsewhere.
        `weights_filled` must follow."""
        own = [(weight.name, weight.value) for weight in (*self.frozen, *self.weights)]
        return [*own, *self.balance.corrections.items()]

    def weights_filled(self) -> None:
        """Takes note of new weights: masters in host memory go up, frozen ones are known anew. Collective."""
        send_up(self._hosted.values())
        self._base = fingerprint(self.frozen, self.device) if self.frozen else None

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` gave, in this layout. Raises InputError for a missing tensor."""
        own = list(self._named_state())
        missing = sorted({"step", *dict(own)} - state.keys())
        if missing:
            fault = f"has no {', '.join(missing[:5])} ({len(missing)} missing)."
            raise InputError(Problem(where="checkpoint", fault=fault, fix="resume with the model it is of"))
        if self._base is not None:
            check_base(state["base"], self._base)
        with torch.no_grad():
            for name, value in own:
                local_part(value).copy_(local_part(state[name]))
        send_up(self._hosted.values())
        if self.scaler is not None:
            saved = {key: state[f"loss_scaler.{key}"] for key in self.scaler.state_dict()}
            self.scaler.load_state_dict(saved)
        self.steps_done = int(state["step"])


def _check_world(plan: Plan) -> None:
    ranks, needed = dist.get_world_size(), plan.strategy.degrees.world
    if ranks != needed:
        raise InputError(
            Problem(
                where="ranks",
                fault=f"{ranks} were started, but the plan is for {needed}.",
                fix=f"start {needed}, such as torchrun --nproc-per-node {needed}",
            )
        )


def _check_averages(meshes: Meshes, device: torch.device) -> None:
    """Raises CheckError if this build's collectives sum where FSDP asks for the mean.

    Gloo of some builds did (pytorch#162338); gradients would be dp times too large without any error.
    """
    if dist.get_backend() == "fake":  # rank 0 alone, to be measured: nothing is sent
        return
    for axis in range(meshes.data.ndim):
        group, ranks = meshes.data.get_group(axis), meshes.data.size(axis)
        whole, part = torch.full((ranks,), 3.0, device=device), torch.zeros(1, device=device)
        if ranks > 1:
            dist.all_reduce(whole, op=dist.ReduceOp.AVG, group=group)
            # The old name is deprecated since 2.13, the new one missing before.
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            scatter(part, whole, op=dist.ReduceOp.AVG, group=group)
            if part.item() != 3.0:
                raise CheckError(
                    f"torch {torch.__version__}: the mean of 3.0 over {ranks} data-parallel ranks came out "
                    f"as {part.item()}; gradients would be wrong. Use another torch build."
                )


def _build_modules(plan: Plan, meshes: Meshes, build: Callable[[int], StageModel]) -> list[StageModule]:
    """The stages of this pipeline rank, in order, all writing to one record."""
    degrees = plan.strategy.degrees
    record = Record()
    rank = meshes.pp.get_local_rank()
    own = degrees.stages_of_pp_rank(rank)
    return [StageModule(build(index), index, degrees.zero, record) for index in own]


def _gradient(weight: Weight) -> Tensor:
    """This rank's part of a weight's gradient, beside the shard that the optimizer updates."""
    if weight.host is None:
        return _local_gradient(weight.parameter)
    if weight.parameter.grad is not None:
        weight.host.receive(_local_gradient(weight.parameter))
        weight.parameter.grad = None
    return weight.host.take_gradient()


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a gradient, laid out as the parameter is."""
    grad: Any = parameter.grad
    if grad is None:
        return torch.zeros_like(local_part(parameter.detach()))
    if isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        grad = grad.redistribute(placements=parameter.placements)
    return local_part(grad)
