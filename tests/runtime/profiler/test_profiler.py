"""A small profile of a tiny model on this machine, and what happens when parts of it fail."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from planner.foundation.decode import decode_json, to_json
from planner.foundation.errors import InputError
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.profile import LayerKind, LayerSample, Op, Profile, load_profile
from planner.strategy.strategy import Degrees
from runtime.check.memory import storage_bytes
from runtime.parallel.meshes import fake_world
from runtime.profiler import layers as measure_layers
from runtime.profiler.layers import LayerBench, LayerCase, build_layer
from runtime.profiler.profiler import take_profile
from runtime.profiler.scope import Scope
from runtime.profiler.timing import ChildFailed, Effort, Emit, run_children, summarize, time_phases
from tests.plans import local_cluster, tiny_llama

SEQ, HIDDEN, VOCAB = 32, 32, 64
ONCE = Effort(warmup=1, least=2, most=2, budget_s=0.0)
CPU = torch.device("cpu")


class Silence:
    """Counts the steps of a profile."""

    def __init__(self) -> None:
        self.total, self.steps = 0, 0
        self.said: list[str] = []

    def ahead(self, cases: int, left_s: float | None) -> None:
        self.total = max(self.total, cases)

    def step(self, text: str) -> None:
        self.steps += 1

    def say(self, text: str) -> None:
        self.said.append(text)


def scope(widths: tuple[int, ...] = (1, 2)) -> Scope:
    return Scope(
        seqs=(SEQ,),
        widths=widths,
        micro_batches=(1, 2),
        sizes_bytes=(4096, 65536),
        layer_effort=ONCE,
        comm_effort=ONCE,
        host_effort=ONCE,
        contention_window_s=0.02,
        target=1e-9,  # no sample is predicted so well: every case is measured
    )


@pytest.fixture(scope="module")
def watched() -> tuple[Profile, Silence]:
    progress = Silence()
    model = tiny_llama(hidden=HIDDEN, vocab=VOCAB)
    return take_profile([model], local_cluster(2), Precision.FP32, scope(), progress), progress


def sample(
    profile: Profile,
    kind: LayerKind,
    recompute: Recompute,
    micro_batch: int,
    *,
    tp: int = 1,
    sp: bool = False,
) -> LayerSample:
    wanted = (kind, recompute, micro_batch, tp, sp)
    (found,) = [
        s for s in profile.layers if (s.kind, s.recompute, s.micro_batch, s.tp, s.sequence_parallel) == wanted
    ]
    return found


def test_it_reads_back_strictly(watched: tuple[Profile, Silence], tmp_path: Path) -> None:
    profile, _ = watched
    path = tmp_path / "profile.json"
    path.write_text(to_json(profile))
    assert load_profile(path) == profile
    path.write_text(to_json(profile).replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(InputError, match="99"):
        load_profile(path)
    with pytest.raises(InputError, match="unknown key"):
        decode_json(Profile, to_json(profile).replace('"cores"', '"colour"'), source="x")


def test_nothing_is_missing(watched: tuple[Profile, Silence]) -> None:
    profile, progress = watched
    assert profile.skipped == () and progress.said == []
    assert len(profile.layers) == 3 * (2 + 2 + 3 * 2)  # three widths: tp 1, tp 2, tp 2 with sequences
    assert {(c.op, c.ranks, c.groups, c.bytes) for c in profile.comms} == {
        (op, 2, 1, size) for op in Op for size in (4096, 65536) if op is not Op.ALL_TO_ALL or size == 4096
    }
    assert [c.active for c in profile.contention] == [1, 2]
    assert progress.steps == progress.total
    assert profile.versions["torch"] == torch.__version__
    assert profile.cores is not None and profile.cores >= 1


def test_figures_are_positive(watched: tuple[Profile, Silence]) -> None:
    profile, _ = watched
    assert all(s.forward_s > 0 and s.backward_s > 0 and s.saved_bytes > 0 for s in profile.layers)
    assert all(s.forward_transient_bytes > 0 and s.backward_transient_bytes > 0 for s in profile.layers)
    assert all(c.seconds > 0 and c.samples >= 2 for c in profile.comms)
    assert all(c.slowdown >= 1 for c in profile.contention)
    assert all(c.value >= 0 and c.origin.startswith("measured") for c in profile.constants)
    positive = ("gemm_flops", "memory_bytes_per_s", "host_block_forward_s", "optimizer_s_per_param")
    assert all((profile.constant(name) or 0) > 0 for name in positive)
    written = {constant.name for constant in profile.constants}
    assert written >= {
        "fsdp_unit_forward_s", "fsdp_unit_backward_s", "fsdp_copy_s_per_byte", "replicate_unit_forward_s",
        "replicate_unit_backward_s", "pp_action_s", "optimizer_s_per_tensor", "clip_s_per_param",
        "clip_s_per_tensor", "grad_accumulate_s_per_param", "runtime_bytes", "fsdp_gather_bend_bytes",
        "fsdp_reduce_beyond_s_per_byte", "replicate_reduce_bend_bytes",
    }  # fmt: skip


def test_saved_bytes_by_formula(watched: tuple[Profile, Silence]) -> None:
    """The embedding keeps its tokens, a recomputed block its input, of which sequence parallelism a slice."""
    profile, _ = watched
    for micro_batch in (1, 2):
        tokens = micro_batch * SEQ
        embedding = sample(profile, LayerKind.EMBEDDING, Recompute.NONE, micro_batch)
        assert embedding.saved_bytes == 8 * tokens
        full = sample(profile, LayerKind.BLOCK, Recompute.FULL, micro_batch)
        assert full.saved_bytes == 4 * tokens * HIDDEN
        sliced = sample(profile, LayerKind.BLOCK, Recompute.FULL, micro_batch, tp=2, sp=True)
        assert sliced.saved_bytes == 4 * tokens * HIDDEN // 2


def test_saved_bytes_order(watched: tuple[Profile, Silence]) -> None:
    profile, _ = watched
    for tp, sp in ((1, False), (2, False), (2, True)):
        none, selective, full = (
            sample(profile, LayerKind.BLOCK, option, 2, tp=tp, sp=sp).saved_bytes for option in Recompute
        )
        assert full < selective < none
        half = sample(profile, LayerKind.BLOCK, Recompute.NONE, 1, tp=tp, sp=sp).saved_bytes
        assert none == pytest.approx(2 * half, rel=0.01)
    whole = sample(profile, LayerKind.BLOCK, Recompute.NONE, 2).saved_bytes
    split = sample(profile, LayerKind.BLOCK, Recompute.NONE, 2, tp=2).saved_bytes
    slices = sample(profile, LayerKind.BLOCK, Recompute.NONE, 2, tp=2, sp=True).saved_bytes
    assert slices < split < whole


def known_gradients(node: Any) -> list[Any]:
    """What the nodes of a graph hold under the name `gradient`."""
    if node is None:
        return []
    own = [node.gradient] if hasattr(node, "gradient") else []
    return own + [found for after, _ in node.next_functions for found in known_gradients(after)]


@pytest.mark.parametrize("kind", list(LayerKind))
def test_saved_bytes_are_those_that_autograd_packs(kind: LayerKind) -> None:
    """An independent count: the storages that autograd saves, without parameters and buffers, and the
    gradients that the head's loss has formed already."""
    model = tiny_llama(hidden=HIDDEN, vocab=VOCAB)
    case = LayerCase(
        kind=kind, recompute=Recompute.NONE, tp=1, sequence_parallel=False, micro_batch=2, seq=SEQ
    )
    with fake_world(Degrees(), "cpu") as meshes:
        layer = build_layer(case, model, Precision.FP32, meshes)
        bench = LayerBench(case, layer, model, Precision.FP32)
        saved, _, _ = bench.memory()
        packed: list[Any] = []
        bench.prepare()

        def pack(tensor: Any) -> Any:
            packed.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            bench.forward()
    assert bench.output is not None
    packed += known_gradients(bench.output.grad_fn)
    own = [*layer.parameters(), *layer.buffers(), bench.targets]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept = [t for t in packed if t.untyped_storage().data_ptr() not in addresses]
    assert saved == pytest.approx(storage_bytes(kept), rel=0.01)


def failing_sample(
    case: LayerCase, *args: Any, real: Any = measure_layers._sample, **kwargs: Any
) -> LayerSample:
    if case.kind is LayerKind.HEAD and case.micro_batch == 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    if case.recompute is Recompute.FULL:
        os.kill(os.getpid(), signal.SIGKILL)
    found: LayerSample = real(case, *args, **kwargs)
    return found


def test_what_fails_is_skipped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case without memory, and processes that the system kills: the others are still measured."""
    monkeypatch.setattr(measure_layers, "_sample", failing_sample)
    progress = Silence()
    model = tiny_llama(hidden=HIDDEN, vocab=VOCAB)
    profile = take_profile([model], local_cluster(1), Precision.FP32, scope((1,)), progress)
    assert len(profile.layers) == 2 + 2 + 3 * 2 - 3
    skipped = list(profile.skipped)
    assert skipped == progress.said or [f"skipped: {text}" for text in skipped] == progress.said
    block, head = (
        f"layers of tiny-llama: {kind} tp1 micro-batch 1 of {SEQ} tokens" for kind in ("block", "head")
    )
    assert f"{block} recompute full: the process was killed by SIGKILL" in skipped
    assert f"{head}: not enough memory" in skipped
    assert any("one device has nobody" in text for text in skipped)
    assert len(skipped) == 4 and profile.comms == ()


def test_children_fail_loudly_and_leave_nobody() -> None:
    def raises(rank: int, emit: Emit) -> None:
        emit({"pid": os.getpid()})
        if rank == 1:
            raise ValueError("no such thing")
        signal.pause()

    seen = []
    with pytest.raises(ChildFailed, match="ValueError: no such thing"):
        for message in run_children(raises, 2):
            seen.append(message["pid"])
    assert 1 <= len(seen) <= 2
    for process in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_silent_children_are_ended() -> None:
    with pytest.raises(ChildFailed, match="no sign of life"):
        list(run_children(lambda rank, emit: signal.pause(), silence_s=0.2))


def test_summary_of_timings() -> None:
    timing = summarize([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.median_s, timing.samples) == (3.0, 5)
    assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert summarize([2.0]).spread == 0.0


def test_phases_run_in_turn_and_often_enough() -> None:
    order: list[str] = []
    effort = Effort(warmup=2, least=3, most=9, budget_s=0.0)
    first, second = time_phases([lambda: order.append("a"), lambda: order.append("b")], effort, CPU)
    assert order == ["a", "b"] * 5
    assert first.samples == second.samples == 3
