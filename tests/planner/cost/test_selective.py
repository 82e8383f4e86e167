"""What selective recomputation takes and keeps, by each engine's own kind, against what was published."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from planner.calibration.runs import Run, RunRecompute, read_runs
from planner.calibration.validate import validate
from planner.cost.constants import problem_time_constants
from planner.cost.layer import LayerShape
from planner.cost.memory.parameter_state import states_of
from planner.cost.stage.layer_cost import LayerModel
from planner.job.engine_settings import Engine, EngineSettings
from planner.profile.profile import LayerKind
from planner.strategy.strategy import Degrees, Zero
from tests import run_samples
from tests.planner import instances

DATA = Path(__file__).parents[3] / "bench" / "data"
MEGATRON_22B = dataclasses.replace(
    run_samples.GPT,
    layers=48,
    hidden=6144,
    ffn=4 * 6144,
    heads=64,
    kv_heads=64,
    seq_len=2048,
    tp=8,
    pp=1,
    dp=1,
    micro_batch=4,
    global_batch=4,
)
LLAMA = dataclasses.replace(
    run_samples.LLAMA,
    layers=32,
    hidden=4096,
    ffn=14336,
    heads=32,
    kv_heads=8,
    seq_len=2048,
    device="h100-sxm-80gb",
    tp=1,
    dp=8,
    micro_batch=4,
)
NONE, FULL = RunRecompute.NONE, RunRecompute.FULL


def backward_s(run: Run, recompute: RunRecompute) -> float:
    """Seconds that a block of a run takes going back."""
    setup = run_samples.setup(dataclasses.replace(run, recompute=recompute))
    problem, degrees = setup.problem, setup.strategy.degrees
    shape = LayerShape(
        kind=LayerKind.BLOCK,
        tp=degrees.tp,
        sequence_parallel=degrees.sequence_parallel,
        micro_batch=degrees.micro_batch,
        seq=problem.workload.seq,
        precision=problem.workload.precision,
        recompute=setup.strategy.stages[0].recompute.options()[0],
        kernel=problem.engine_settings.attention,
    )
    return LayerModel(problem, problem_time_constants(problem)).cost(shape).backward_s


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_megatrons_core_of_attention_takes_what_was_measured(sequence_parallel: bool) -> None:
    """arXiv 2205.05198, table 4: 11.9 ms back without recomputation, 13.2 with; 11.8 and 13.1 under sequence
    parallelism."""
    run = dataclasses.replace(MEGATRON_22B, sequence_parallel=sequence_parallel)
    again_s = backward_s(run, RunRecompute.SELECTIVE) - backward_s(run, RunRecompute.NONE)
    assert again_s == pytest.approx(1.3e-3, rel=0.15)


def test_an_mlp_runs_again_but_for_its_last_product() -> None:
    """GPT of 1.3 billion on an H100 (bench/data/h100_reference.csv): 325.7 ms a step where torch's checkpoint
    recomputes the MLP, 299.3 without."""
    runs = {run.id: run for run in read_runs([DATA / "h100_reference.csv"]).runs}
    whole, mlp = runs["h100-g13-s2k-b8"], runs["h100-g13-s2k-b8-mlp"]
    assert whole.step_time_s and mlp.step_time_s and whole.layers
    again_s = backward_s(mlp, RunRecompute.MLP) - backward_s(mlp, RunRecompute.NONE)
    assert whole.layers * again_s == pytest.approx(mlp.step_time_s - whole.step_time_s, rel=0.1)


def test_torchtitan_runs_every_second_product_again_and_in_fp8_all_but_the_last() -> None:
    """Query 1, key 2, value 3 and so on: key, output and the second up projection run again (torchtitan's
    apply_ac counts products). In fp8 none is kept, and nothing needs the last."""
    for precision, least, most in (("bf16", 0.3, 0.6), ("fp8", 0.6, 0.9)):
        run = dataclasses.replace(LLAMA, precision=precision)
        none, selective, full = (backward_s(run, each) for each in (NONE, RunRecompute.SELECTIVE, FULL))
        assert least < (selective - none) / (full - none) < most
    elementwise = dataclasses.replace(LLAMA, framework="pytorch")
    assert backward_s(elementwise, RunRecompute.SELECTIVE) < backward_s(LLAMA, RunRecompute.SELECTIVE)


def test_torchs_pipelines_keep_gradients_whole_until_the_last_micro_batch() -> None:
    """As torchtitan's 405B on 512 H100 shows, which peaks at 72.7 to 82.5 GiB of reserved memory."""
    problem = dataclasses.replace(
        instances.problem(), engine_settings=EngineSettings(engine=Engine.TORCHTITAN)
    )
    for zero in (Zero.GRADIENTS, Zero.PARAMETERS):
        flat = Degrees(dp_shard=4, zero=zero, num_micro_batches=4)
        piped = dataclasses.replace(flat, pp=2)
        assert states_of(problem, flat).block.grads == 1.0
        assert states_of(problem, piped).block.grads == 4.0
        assert states_of(problem, piped).block.weights == 1.0 + 2.0
    runs = [run for run in read_runs([DATA / "tables.csv"]).runs if run.id.startswith("titan")]
    rows = validate([run for run in runs if run.pp and run.pp > 1], lambda device: None).rows
    errors = [row.memory_error for row in rows]
    assert len(errors) == 6 and all(error is not None and -0.25 < error < 0 for error in errors)
