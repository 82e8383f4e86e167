"""Ranks rehearsed alone hold the bytes that they hold among all others; and what the command says of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch")

from planner.calibration.runs import Status, read_runs
from planner.cli import cli
from planner.foundation.errors import InputError
from planner.model.attention import CpExchange
from planner.model.spec import ModelSpec
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.strategy.estimate import Verdict
from planner.strategy.plan import Plan, load_plan, save_plan
from planner.strategy.rehearsal import RehearsalMode
from planner.strategy.strategy import Degrees, Schedule, Zero
from runtime.check.memory import fake_tensors
from runtime.launch.local_ranks import RunFailedError
from runtime.rehearse import rehearse
from runtime.rehearse.rehearse import RehearsalOptions, idle_share, rehearse_rank, rehearse_ranks
from tests.plans import make_plan, tiny_deepseek_experts, tiny_llama
from tests.runtime.ranks import real_peaks

SEQ = 64
WITHIN = 0.03
"""The peak of a rank alone against that of the same rank among others."""

SHAPES = {
    "replicas": Degrees(dp_replicate=4, micro_batch=2, num_micro_batches=2),
    "zero 3": Degrees(dp_shard=4, zero=Zero.PARAMETERS, micro_batch=2, num_micro_batches=2),
    "sequence parallel": Degrees(
        tp=2, sequence_parallel=True, dp_shard=2, zero=Zero.OPTIMIZER, micro_batch=2, num_micro_batches=2
    ),
    "pipeline": Degrees(pp=2, dp_shard=2, zero=Zero.GRADIENTS, micro_batch=2, num_micro_batches=4),
    "zero bubble V": Degrees(pp=4, chunks=2, schedule=Schedule.ZBV, micro_batch=2, num_micro_batches=8),
    "ring": Degrees(pp=2, cp=2, micro_batch=2, num_micro_batches=2, schedule=Schedule.ZB_H1),
    "heads for sequence": Degrees(
        cp=2, cp_exchange=CpExchange.ALL_TO_ALL, dp_shard=2, zero=Zero.OPTIMIZER, micro_batch=2
    ),
}


def sized(model: ModelSpec) -> ModelSpec:
    return dataclasses.replace(model, max_positions=max(model.max_positions, SEQ))


def plan_of(degrees: Degrees, recompute: Recompute = Recompute.NONE, **more: Any) -> Plan:
    model = sized(tiny_llama(layers=max(4, degrees.stages), hidden=128, vocab=512))
    return make_plan(model, degrees, seq=SEQ, recompute=recompute, **more)


@pytest.mark.parametrize("name", SHAPES)
def test_a_rank_alone_holds_what_it_holds_among_others(name: str) -> None:
    recompute = Recompute.FULL if name == "zero 3" else Recompute.NONE
    plan = plan_of(SHAPES[name], recompute)
    peaks = real_peaks(plan)
    for rank in (0, plan.strategy.degrees.world - 1)[: plan.strategy.degrees.pp]:  # else they are alike
        for mode in (RehearsalMode.PROCESSOR, RehearsalMode.FAKE_TENSORS):
            alone = rehearse_rank(plan, rank, (0,), RehearsalOptions(mode=mode, steps=1))
            assert alone.allocated_bytes == pytest.approx(peaks[rank], rel=WITHIN), (rank, mode)


@pytest.mark.parametrize("etp", [None, 1])
def test_experts_meet_balanced_rows(etp: int | None) -> None:
    degrees = Degrees(
        tp=2, sequence_parallel=True, dp_shard=2, ep=2, etp=etp, zero=Zero.OPTIMIZER, micro_batch=2
    )
    plan = make_plan(sized(tiny_deepseek_experts()), degrees, seq=SEQ, precision=Precision.BF16)
    peaks = real_peaks(plan)
    for mode in (RehearsalMode.PROCESSOR, RehearsalMode.FAKE_TENSORS):
        alone = rehearse_rank(plan, 0, (0,), RehearsalOptions(mode=mode, steps=1))
        assert alone.allocated_bytes == pytest.approx(peaks[0], rel=WITHIN), mode


def test_every_pass_of_a_rank_is_timed() -> None:
    plan = plan_of(SHAPES["zero bubble V"])
    alone = rehearse_rank(plan, 3, (3,), RehearsalOptions(mode=RehearsalMode.PROCESSOR, steps=2))
    assert alone.stages == (3, 4)
    assert {(each.stage, each.kind) for each in alone.passes} == {(s, k) for s in (3, 4) for k in "FIW"}
    assert all(each.seconds > 0 and each.samples == 14 for each in alone.passes)  # 2 steps, 7 of 8 each
    assert alone.step_s is not None and alone.update_s is not None and alone.reference_s
    assert sum(8 * each.seconds for each in alone.passes) < 3 * alone.step_s
    assert alone.idle_share is None


def test_shapes_alone_are_not_timed_and_take_no_memory() -> None:
    degrees = Degrees(dp_shard=4, zero=Zero.PARAMETERS, micro_batch=4)
    model = dataclasses.replace(tiny_llama(layers=2, hidden=8192, vocab=4096), max_positions=4096)
    plan = make_plan(model, degrees, seq=4096, precision=Precision.BF16)
    alone = rehearse_rank(plan, 0, (0,), RehearsalOptions(mode=RehearsalMode.FAKE_TENSORS))
    assert alone.passes == () and alone.step_s is None
    assert alone.allocated_bytes is not None and alone.allocated_bytes > 4 * 2**30


def test_ranks_side_by_side_are_what_each_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "usable_cores", lambda: 2)
    plan, options = plan_of(SHAPES["zero bubble V"]), RehearsalOptions(mode=RehearsalMode.FAKE_TENSORS)
    asked, said = [(rank, (rank,)) for rank in (3, 0, 1)], list[str]()
    found = list(rehearse_ranks(plan, asked, options, said.append))
    assert said == ["rank 3 and rank 0 (2 of 3)", "rank 1 (3 of 3)"]
    alone = [rehearse_rank(plan, *each, options) for each in asked]
    assert [dataclasses.replace(each, wall_s=0.0) for each in found] == [
        dataclasses.replace(each, wall_s=0.0) for each in alone
    ]


def test_of_ranks_side_by_side_each_fails_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(self: Any) -> None:
        if self.executor.modules[0].index == 1:
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(rehearse, "usable_cores", lambda: 2)
    monkeypatch.setattr(rehearse._Rank, "step", steps)
    options = RehearsalOptions(mode=RehearsalMode.FAKE_TENSORS)
    ranks = rehearse_ranks(plan_of(SHAPES["pipeline"]), [(0, (0,)), (2, (1,))], options, lambda _: None)
    assert next(ranks).rank == 0
    with pytest.raises(RunFailedError, match="rank 2 could not be rehearsed: RuntimeError: no such kernel"):
        next(ranks)


def test_live_bytes_follow_storages() -> None:
    with fake_tensors(block_bytes=512) as live:
        begun = live.begin()
        a = torch.zeros(100)
        view = a.view(10, 10)
        assert live.now_bytes == begun + 512
        del a
        assert live.now_bytes == begun + 512
        view.untyped_storage().resize_(0)
        assert live.now_bytes == begun
        view.untyped_storage().resize_(4000)
        assert live.now_bytes == begun + 4096
        del view
        assert live.now_bytes == begun and live.peak_bytes == begun + 4096


def test_idle_share_is_what_no_kernel_covers() -> None:
    assert idle_share([]) is None
    assert idle_share([(0, 4), (2, 6), (8, 10)]) == pytest.approx(0.2)
    assert idle_share([(5, 6), (5, 6)]) == pytest.approx(0.0)


def test_a_rank_without_enough_memory_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(rehearse._Rank, "step", fails)
    plan = plan_of(SHAPES["zero 3"])
    alone = rehearse_rank(plan, 0, (0,), RehearsalOptions(mode=RehearsalMode.PROCESSOR))
    assert alone.ran_out == "running a step" and alone.allocated_bytes is None


def test_another_fault_names_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(rehearse._Rank, "step", fails)
    with pytest.raises(RunFailedError, match="rank 2 could not be rehearsed: RuntimeError: no such kernel"):
        rehearse_rank(plan_of(SHAPES["zero 3"]), 2, (0,), RehearsalOptions(mode=RehearsalMode.PROCESSOR))


# The command


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    asked = ["--model", "shardwise-demo", "--cluster", "local:4", "--seq", "64", "--batch", "8"]
    made = plan("solve", *asked, "--precision", "fp32", "--fix", "pp=2", "--time-limit", "2", "-o", str(path))
    assert made.exit_code in (0, 5), made.output
    return path


def test_the_command_tells_every_kind_of_rank(solved: Path, tmp_path: Path) -> None:
    runs, out = tmp_path / "runs.csv", tmp_path / "rehearsed.json"
    done = plan("rehearse", str(solved), "--steps", "1", "--json", "--runs", str(runs), "-o", str(out))
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["mode"] == "processor" and document["complete"]
    assert document["refined"]["verdict"] == "SAFE" and document["refined"]["measured_share"] > 0.5
    carrying = load_plan(out)
    assert carrying.rehearsal is not None and carrying.rehearsal.complete
    assert dataclasses.replace(carrying, rehearsal=None) == load_plan(solved)
    for _ in range(2):
        again = plan("rehearse", str(out), "--fake", "--runs", str(runs))
        assert again.exit_code == 0, again.output
    (row,) = read_runs([runs]).runs
    assert row.status is Status.OK and row.peak_memory_gib is not None and row.step_time_s is None
    peaks = [rank.allocated_bytes or 0 for rank in carrying.rehearsal.ranks]
    assert row.peak_memory_gib * 2**30 == pytest.approx(max(peaks), rel=WITHIN)


def test_a_plan_for_accelerators_is_traced_on_shapes_alone(tmp_path: Path) -> None:
    if torch.cuda.device_count():
        pytest.skip("this machine has an accelerator")
    path = tmp_path / "plan.json"
    asked = ["--model", "llama-3.2-1b", "--cluster", "2x8:h100-sxm-80gb", "--seq", "2048", "--batch", "16"]
    plan("solve", *asked, "--engine", "native", "--fix", "pp=2", "--time-limit", "2", "-o", str(path))
    done = plan("rehearse", str(path))
    assert done.exit_code == 0, done.output
    assert "fake tensors" in done.output and "this machine has no h100-sxm-80gb" in done.output
    assert "times stay as predicted" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "9"], "9: the plan has 4 ranks. Legal here: 0 to 3."),
        (["--steps", "2"], "of which nothing is timed"),
        (["--stages", "0,x"], "'x' is no stage of the plan"),
        (["--stages", "77"], "'77' is no stage of the plan"),
        (["--rank", "0", "--stages", "0"], "named by --rank already"),
        (["--rank", "0", "--runs", "RUNS"], "only some kinds of its ranks were rehearsed"),
    ],
)
def test_wrong_choices_are_told(solved: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    given = [text.replace("RUNS", str(tmp_path / "runs.csv")) for text in arguments]
    done = plan("rehearse", str(solved), "--fake", *given)
    assert done.exit_code == 2 and words in done.stderr and "Traceback" not in done.output


def test_a_rank_that_ran_out_is_exit_code_4_and_a_row(
    solved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(rehearse._Rank, "step", fails)
    runs = tmp_path / "runs.csv"
    done = plan("rehearse", str(solved), "--runs", str(runs))
    assert done.exit_code == 4 and "judged SAFE" in " ".join(done.output.split())
    (row,) = read_runs([runs]).runs
    assert row.status is Status.OOM and row.peak_memory_gib is None


def test_solve_picks_by_what_rehearsals_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first plan is made to look ten times slower: a runner-up is the answer, with its own bound."""
    from planner.commands.splitting import rehearsed_choice

    real, told = rehearsed_choice._rehearsed, []

    def slower(made: Plan, *rest: Any, **more: Any) -> Any:
        done = real(made, *rest, **more)
        told.append(made.strategy.degrees.label())
        if len(told) > 1:
            return done
        refined = dataclasses.replace(done.refined, step_time_s=10 * done.refined.step_time_s)
        return done._replace(refined=refined)

    monkeypatch.setattr(rehearsed_choice, "_rehearsed", slower)
    path = tmp_path / "plan.json"
    asked = ["--model", "shardwise-demo", "--cluster", "local:2", "--seq", "64", "--batch", "8"]
    done = plan(
        "solve", *asked, "--precision", "fp32", "--time-limit", "2", "--rehearse", "2", "-o", str(path)
    )
    assert done.exit_code in (0, 5), done.output
    chosen = load_plan(path)
    assert len(told) == 2 and chosen.strategy.degrees.label() == told[1]
    assert chosen.rehearsal is not None and [other.label for other in chosen.rehearsal.others] == told[:1]
    assert chosen.alternatives[0].strategy.degrees.label() == told[0]
    assert chosen.alternatives[0].reason.startswith("rehearsed: ")
    assert chosen.solver is not None and chosen.solver.objective_s == chosen.estimate.step_time_s
    assert plan("check", str(path)).exit_code == 0


def test_a_plan_judged_by_another_limit_does_not_fit(solved: Path, tmp_path: Path) -> None:
    made = load_plan(solved)
    tight = dataclasses.replace(made, estimate=dataclasses.replace(made.estimate, memory_limit_bytes=2**20))
    path = tmp_path / "tight.json"
    save_plan(tight, path)
    done = plan("rehearse", str(path), "--fake", "--json")
    assert done.exit_code == 4
    assert json.loads(done.stdout)["refined"]["verdict"] == Verdict.NO


def test_shapes_alone_are_not_compiled(solved: Path) -> None:
    result = plan("rehearse", str(solved), "--fake", "--compile")
    assert result.exit_code == 2
    assert "--compile: shapes alone are traced (--fake)" in result.output


def test_shapes_alone_tell_of_memory(solved: Path) -> None:
    told = plan("rehearse", str(solved), "--fake", "--rank", "0").output
    assert "memory, on shapes alone; times stay as predicted" in told
    assert "of a rank's time" not in told


def test_an_accelerator_that_others_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.commands.shared.rehearsing import _check_free
    from planner.hardware import local_machine as nvidia

    monkeypatch.setattr(nvidia, "others_at_work", lambda count: ["process 7 (train.py) computes"])
    with pytest.raises(InputError, match=r"process 7 .*--anyway"):
        _check_free()
    monkeypatch.setattr(nvidia, "others_at_work", lambda count: [])
    _check_free()
