"""Messages of one shape: their sizes, their groups on the topology, and what they take."""

from __future__ import annotations

import math

from planner.cost.communication.collectives import CommCost, CommModel, Group
from planner.cost.constants import TimeConstants
from planner.cost.layer import Pass, Unit
from planner.job.engine_settings import Engine
from planner.job.problem import PlanningProblem
from planner.model.workload import Precision
from planner.profile.profile import Op
from planner.strategy.engines.native import chunk_count
from planner.strategy.strategy import Degrees, Zero


class Messages:
    """Communication of one micro-batch and of once a step under given degrees."""

    def __init__(
        self,
        problem: PlanningProblem,
        degrees: Degrees,
        comms: CommModel,
        constants: TimeConstants,
        stream_width: int,
    ) -> None:
        self.problem, self.degrees, self.comm_model = problem, degrees, comms
        self.constants, self.stream_width = constants, stream_width
        self._groups: dict[tuple[int, int], Group] = {}
        self._over_tp_s: dict[tuple[Op, bool], float] = {}
        self.wrapper = "replicate" if degrees.zero is Zero.NONE else "fsdp"

    def constant(self, name: str) -> float:
        """A constant that the profile measured, or 0."""
        return self.comm_model.constant(name)

    def seconds(self, op: Op, size_bytes: float, group: Group) -> float:
        """Seconds of a communication under these degrees."""
        return self.comm(op, size_bytes, group).seconds

    def comm(self, op: Op, size_bytes: float, group: Group) -> CommCost:
        """A communication under these degrees."""
        return self.comm_model.cost(op, size_bytes, group)

    def _group(self, ranks: int, block: int) -> Group:
        """A group of `ranks` ranks within `block` neighbouring ranks."""
        if (ranks, block) not in self._groups:
            per_node = self.problem.cluster.devices_per_node
            self._groups[ranks, block] = Group(
                ranks=ranks,
                groups=max(1, min(per_node, self.degrees.world) // ranks),
                spans_nodes=block > per_node,
                nodes=min(ranks, math.ceil(block / per_node)) if block > per_node else None,
                stride=max(1, block // ranks),
            )
        return self._groups[ranks, block]

    def tp_group(self) -> Group:
        """The tensor-parallel group: neighbouring ranks."""
        return self._group(self.degrees.tp, self.degrees.tp)

    def loss_s(self) -> float:
        """What the loss over a sharded vocabulary sends: maximum, sum and the target's logit of each token.

        The own runtime gathers the logarithm of the sum and the target's logit, chunk by chunk. A model
        without a vocabulary sends nothing.
        """
        columns = self.problem.model.vocab_shard(self.degrees.tp)
        if not columns:
            return 0.0
        if not self.problem.engine_settings.own:
            return 3 * self.seconds(Op.ALL_REDUCE, 4.0 * self.tokens, self.tp_group())
        chunks = chunk_count(math.ceil(self.tokens), columns)
        size = 8.0 * self.tokens * self.degrees.tp / chunks
        return chunks * self.seconds(Op.ALL_GATHER, size, self.tp_group())

    @property
    def _sharding(self) -> int:
        """Neighbouring ranks among which state is shared out."""
        return self.degrees.dp_shard * self.degrees.cp * self.degrees.tp

    def shard_group(self) -> Group:
        """The ranks that share out state."""
        return self._group(self.degrees.weight_shards, self._sharding)

    def replicate_group(self) -> Group:
        """The ranks that hold the same shards."""
        degrees = self.degrees
        return self._group(degrees.replicas // degrees.weight_shards, degrees.world // degrees.pp)

    def expert_shard_group(self) -> Group:
        """The ranks that share out the state of routed experts."""
        return self._group(self.degrees.expert_shards, self._sharding)

    def expert_replicate_group(self) -> Group:
        """The ranks that hold the same shards of routed experts."""
        degrees = self.degrees
        return self._group(degrees.expert_replicas // degrees.expert_shards, degrees.world // degrees.pp)

    def cp_seconds(self, op: Op, size_bytes: float) -> float:
        """Seconds of a message of context parallelism; a hop of its ring is as slow as the slowest."""
        group = self._group(self.degrees.cp, self.degrees.cp * self.degrees.tp)
        if op is Op.P2P:
            pairs = group.groups * group.ranks // 2
            group = Group(ranks=2, groups=pairs, spans_nodes=group.spans_nodes, stride=group.stride)
        return self.constants.cp_scale * self.seconds(op, size_bytes, group)

    def spread_origin(self) -> str:
        """Where the figures of context- or expert-parallel messages come from."""
        if self.degrees.cp == 1:
            return self.comm(Op.ALL_TO_ALL, self.hidden_bytes(), self.ep_group()).origin
        group = self._group(self.degrees.cp, self.degrees.cp * self.degrees.tp)
        return self.comm(Op.ALL_GATHER, self.hidden_bytes(), group).origin

    def ep_group(self) -> Group:
        """The ranks that share out the routed experts."""
        return self._group(self.degrees.ep, self.degrees.expert_ranks)

    def expert_tp_group(self) -> Group:
        """The ranks that share out one expert."""
        return self._group(self.degrees.expert_tp, self.degrees.expert_tp)

    def part_in_node(self, group: Group) -> Group:
        """The ranks of a group that lie in one node."""
        ranks = max(1, group.ranks // (group.nodes or 1))
        return Group(ranks=ranks, groups=group.groups, spans_nodes=False)

    @property
    def tokens(self) -> float:
        """Tokens of one micro-batch that a tensor-parallel group holds."""
        return self.degrees.micro_batch * self.problem.workload.seq / self.degrees.cp

    @property
    def value_bytes(self) -> int:
        """Bytes of a value of an activation."""
        return self.problem.workload.precision.compute_bytes

    def hidden_bytes(self) -> float:
        """The residual stream of one micro-batch, whole."""
        return float(self.tokens * self.problem.model.hidden * self.value_bytes)

    def message_bytes(self) -> float:
        """What one stage sends to the next for one micro-batch, at the widest boundary of the model."""
        return self.hidden_bytes() / self.problem.model.hidden * self.stream_width

    def boundary_bytes(self) -> float:
        """What of that one device sends, and its neighbour holds."""
        return self.message_bytes() / (self.degrees.tp if self.degrees.sequence_parallel else 1)

    def over_tp(self, op: Op, operands: bool = False) -> float:
        """Seconds of a message of the residual stream over the tensor-parallel group.

        `operands`: of what goes into products, which some engines cast before they send it.
        """
        cast = operands and self.problem.engine_settings.sends_operands_cast
        if (op, cast) not in self._over_tp_s:
            self._over_tp_s[op, cast] = self._stream_s(op, cast)
        return self._over_tp_s[op, cast]

    def _stream_s(self, op: Op, cast: bool) -> float:
        precision = self.problem.workload.precision
        share = precision.operand_bytes / precision.compute_bytes if cast else 1.0
        seconds = self.seconds(op, share * self.hidden_bytes(), self.tp_group())
        half = 1.0 if op is Op.ALL_REDUCE else 0.5
        late_s = half * self._late_s(self.constants.tp_rank_s, self.degrees.tp, seconds)
        return late_s + self.constants.tp_scale * seconds

    def over_copies_s(self, size_bytes: float, copies: int) -> float:
        """Seconds of summing gradients over neighbours that have copies of the same weights."""
        group = self._group(copies, copies)
        return self.constants.tp_scale * self.seconds(Op.ALL_REDUCE, size_bytes, group)

    @staticmethod
    def _late_s(rank_s: float, ranks: int, seconds: float) -> float:
        """What a message waits for ranks that are late; nothing where communication takes no time."""
        return rank_s * (ranks - 1) if seconds > 0 else 0.0

    def p2p_s(self) -> float:
        """One hop of the residual stream between neighbouring stages.

        Where tensor-parallel ranks hold all of it, some engines let each send its share and put the shares
        together on the other side.
        """
        if self.degrees.pp == 1:
            return 0.0
        per_node = self.problem.cluster.devices_per_node
        group = Group(
            ranks=2,
            groups=max(1, min(per_node, self.degrees.world) // 2),
            spans_nodes=self.degrees.world > per_node,
            stride=self.degrees.world // self.degrees.pp,
        )
        if self.degrees.sequence_parallel or not self.problem.engine_settings.scatters_boundaries:
            return self.constants.pp_scale * self.seconds(Op.P2P, self.boundary_bytes(), group)
        share_s = self.seconds(Op.P2P, self.message_bytes() / self.degrees.tp, group)
        whole_s = self.seconds(Op.ALL_GATHER, self.message_bytes(), self.tp_group())
        return self.constants.pp_scale * share_s + self.constants.tp_scale * whole_s

    def gather(self, dense_params: float, routed_params: float = 0.0) -> Pass:
        """All-gather of a unit's parameters in the compute precision, with copies in and out.

        Those of routed experts are gathered over the fewer ranks that hold copies of them.
        """
        degrees, params = self.degrees, dense_params + routed_params
        if not degrees.spreads_experts:  # of one unit with all else
            dense_params, routed_params = params, 0.0
        if max(degrees.weight_shards, degrees.expert_shards if routed_params else 1) == 1 or params == 0:
            return Pass()
        copies_s = self._copies_s("fsdp_gather", params * self.value_bytes)
        seconds = self.seconds(Op.ALL_GATHER, dense_params * self.value_bytes, self.shard_group())
        routed = routed_params * self.value_bytes
        seconds += self.seconds(Op.ALL_GATHER, routed, self.expert_shard_group())
        return Pass(host_s=copies_s, dp_s=self._data_parallel_s(seconds, degrees.weight_shards))

    def reduce(self, unit: Unit) -> Pass:
        """Reduction of one unit's gradients: scatter over shards, all-reduce over replicas.

        Experts have replicas of their own: fewer, since more ranks share them out.
        """
        degrees, each = self.degrees, self.gradient_bytes()
        ranks = max(degrees.replicas, degrees.expert_replicas if unit.routed_trained else 1)
        if ranks == 1 or unit.trained == 0:
            return Pass()
        copies_s = self._copies_s(f"{self.wrapper}_reduce", each * unit.trained)
        routed = each * unit.routed_trained * degrees.spreads_experts
        dense = each * unit.trained - routed
        seconds = self._reduced_s(dense, self.shard_group(), self.replicate_group())
        seconds += self._reduced_s(routed, self.expert_shard_group(), self.expert_replicate_group())
        return Pass(host_s=copies_s, dp_s=self._data_parallel_s(seconds, degrees.replicas))

    def _copies_s(self, name: str, size_bytes: float) -> float:
        """Seconds of a unit's copies around a message: by its bytes, and beyond some of them by another rate,
        where the profile tells of one (a CPU's: its large tensors get fresh pages each time)."""
        per_byte, bend = self.constant(f"{name}_copy_s_per_byte"), self.constant(f"{name}_bend_bytes")
        seconds = self.constant(f"{name}_unit_s") + size_bytes * per_byte
        beyond = max(size_bytes - bend, 0.0) if bend else 0.0
        return seconds + beyond * (self.constant(f"{name}_beyond_s_per_byte") - per_byte)

    def _reduced_s(self, size_bytes: float, shards: Group, replicas: Group) -> float:
        """Seconds of scattering gradients over shards and summing each over replicas, or of summing all."""
        if self.problem.engine_settings.reduces_whole(self.problem.workload.precision):
            whole_s = self.seconds(Op.ALL_REDUCE, size_bytes, shards)
            return whole_s + self.seconds(Op.ALL_REDUCE, size_bytes, replicas)
        scatter_s = self.seconds(Op.REDUCE_SCATTER, size_bytes, shards)
        return scatter_s + self.seconds(Op.ALL_REDUCE, size_bytes / shards.ranks, replicas)

    def gradient_bytes(self) -> float:
        """Bytes of each gradient as data ranks reduce it.

        FSDP2 reduces in fp32 as we set it; Megatron-LM in fp16 where that is computed in, and bf16 summed up
        in fp32; DeepSpeed in the compute precision; what is reduced whole, in fp32.
        """
        precision, settings = self.problem.workload.precision, self.problem.engine_settings
        engine = settings.engine
        if settings.reduces_whole(precision):
            return 4.0
        if engine is Engine.DEEPSPEED or (engine is Engine.MEGATRON and precision is Precision.FP16):
            return float(self.value_bytes)
        return 4.0

    def _data_parallel_s(self, seconds: float, ranks: int) -> float:
        """A message between data ranks that takes `seconds` alone: the more ranks, the slower and later."""
        crowded: float = self.constants.dp_scale * ranks**self.constants.dp_congestion
        return self._late_s(self.constants.dp_rank_s, ranks, seconds) + crowded * seconds
