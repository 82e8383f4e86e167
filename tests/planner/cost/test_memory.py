"""Memory: states by engine against published figures, FSDP2's moments against an H100, laws, bands."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from pathlib import Path

import pytest

from planner.calibration.memory_fit import calibrate_memory
from planner.calibration.predict import with_constants
from planner.calibration.run_setup import RunSetup, run_problem
from planner.calibration.runs import MemoryKind, Run, Status, read_runs
from planner.calibration.validate import validate
from planner.cost.constants import MEMORY_SPECS, memory_constants
from planner.cost.evaluate import CostModel, Evaluation, predicted_memory_bytes
from planner.cost.layer import LayerCost, LayerShape
from planner.cost.memory.activations import engine_bytes
from planner.cost.memory.parameter_state import States, states_of
from planner.cost.stage.layer_cost import process_groups
from planner.cost.stage.peak_memory import ErrorBand, memory_band, safe_peak_bytes, safe_tensor_bytes, verdict
from planner.foundation.units import GIB
from planner.job.engine_settings import Engine, EngineSettings, Selective
from planner.job.problem import PlanningProblem
from planner.model.sublayer import AttentionKernel, Recompute
from planner.model.workload import AdapterModules, Adapters, Method, Optimizer, Precision
from planner.profile.profile import PROFILE_SCHEMA, Constant, LayerKind, Profile
from planner.strategy.engines.native import CHUNK_BYTES
from planner.strategy.estimate import Coverage, Verdict
from planner.strategy.strategy import Degrees, Strategy, Zero, even_stages
from tests.planner import instances

REFERENCE = Path(__file__).parents[3] / "bench" / "data" / "h100_reference.csv"


def states(engine: Engine, zero: Zero, shards: int, framework: str = "", **workload: object) -> States:
    """Bytes a parameter with `shards` data ranks and several micro-batches."""
    problem = instances.problem()
    problem = dataclasses.replace(
        problem,
        engine_settings=EngineSettings(engine=engine, framework=framework),
        workload=dataclasses.replace(problem.workload, **workload),  # type: ignore[arg-type]
    )
    replicate, shard = (shards, 1) if zero is Zero.NONE else (1, shards)
    degrees = Degrees(dp_replicate=replicate, dp_shard=shard, zero=zero, num_micro_batches=4)
    return states_of(problem, degrees)


def with_profile(problem: PlanningProblem, **constants: float) -> PlanningProblem:
    """The problem with a profile of these constants and nothing else."""
    found = tuple(Constant(name=name, value=value, origin="test") for name, value in constants.items())
    profile = Profile(
        schema_version=PROFILE_SCHEMA, name="none", device="device", device_title="", backend="", created="",
        versions={}, devices_per_node=8, slots_per_node=None, layers=(), comms=(), contention=(),
        constants=found,
    )  # fmt: skip
    return dataclasses.replace(problem, profile=profile)


def evaluated(
    problem: PlanningProblem, degrees: Degrees, recompute: Recompute = Recompute.NONE
) -> Evaluation:
    stages = even_stages(problem.model.layers, degrees.stages, recompute)
    return CostModel(problem).evaluate(Strategy(degrees=degrees, stages=stages))


# States


def test_bytes_a_parameter_are_the_published_ones() -> None:
    """Megatron-LM: 18, and 6 + 12/d with its distributed optimizer; ZeRO: 16, 4 + 12/d, 2 + 14/d, 16/d."""
    assert states(Engine.MEGATRON, Zero.NONE, 1).block.total == 18
    assert states(Engine.MEGATRON, Zero.OPTIMIZER, 8).block.total == 6 + 12 / 8
    for zero, total in ((0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)):
        assert states(Engine.DEEPSPEED, Zero(zero), 8).block.total == pytest.approx(total)
    assert states(Engine.MEGATRON, Zero.OPTIMIZER, 8, framework="Megatron-DeepSpeed").block.grads == 6
    assert states(Engine.TORCHTITAN, Zero.PARAMETERS, 8).block.total == 2
    assert states(Engine.NATIVE, Zero.NONE, 1, precision=Precision.FP32).block.total == 16


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize("precision", Precision)
def test_a_higher_zero_stage_never_keeps_more(engine: Engine, precision: Precision) -> None:
    for shards in (2, 3, 8, 64):
        totals = [states(engine, zero, shards, precision=precision).block.total for zero in Zero]
        assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("engine", Engine)
def test_more_shards_never_keep_more_and_sum_to_the_model(engine: Engine) -> None:
    """What ZeRO 3 shares out adds up to what one device would keep."""
    alone = states(engine, Zero.PARAMETERS, 1).block.total
    totals = [shards * states(engine, Zero.PARAMETERS, shards).block.total for shards in (1, 2, 5, 16)]
    assert totals == pytest.approx([alone] * 4)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_of_stages_sum_to_the_model(tp: int) -> None:
    """Over tensor and pipeline ranks, matrices count once and vectors tp times."""
    problem = instances.problem(on=instances.cluster(nodes=1, per_node=8))
    degrees = Degrees(tp=tp, pp=2, num_micro_batches=4)
    model = CostModel(problem)
    shape = model.layout(degrees)
    stages = even_stages(problem.model.layers, 2)
    held = tp * sum(shape.stage(stage).params for stage in stages)
    matrices = problem.model.params_total
    assert matrices <= held <= matrices + tp * problem.model.layers * 2 * problem.model.hidden


def test_states_of_the_other_optimizers() -> None:
    """Muon keeps a momentum of blocks and AdamW's two at the ends; Adafactor rows and columns."""
    muon = states(Engine.NATIVE, Zero.NONE, 1, optimizer=Optimizer.MUON)
    assert muon.end.optimizer == 8 and 4 < muon.block.optimizer < 4.2
    factored = states(Engine.NATIVE, Zero.NONE, 1, optimizer=Optimizer.ADAFACTOR)
    block = instances.dense_block(64)
    rows = sum(4 * (m.inputs + m.outputs) for m in block.matrices()) + 4 * 2 * 64
    assert factored.block.optimizer == pytest.approx(rows / block.params)
    assert Optimizer.ADAFACTOR.matrix_state_bytes(4096, 4096) == 4 * 8192


def test_adapters_alone_are_trained() -> None:
    """A frozen weight is kept in the compute precision; 16 bytes and less go to its adapters' share."""
    adapters = Adapters(rank=2, modules=AdapterModules.ALL)
    found = states(Engine.TORCHTITAN, Zero.PARAMETERS, 1, method=Method.LORA, adapters=adapters)
    block = instances.dense_block(64)
    beside = 2 * sum(m.inputs + m.outputs for m in block.matrices()) / block.params
    assert found.end.total == 2 and found.end.grads == 0
    assert found.block.total == pytest.approx(2 + 16 * beside)


# Moments and activations


def test_fsdp2_is_predicted_from_first_principles() -> None:
    """16 runs on an H100 with nothing fitted: allocated within 0.3 % on average, reserved within 1.2 %."""
    allocated, reserved = [], []
    for run in read_runs([REFERENCE]).runs:
        setup = run_problem(run, None)
        assert isinstance(setup, RunSetup), run.id
        done = CostModel(setup.problem).evaluate(setup.strategy)
        assert run.peak_memory_gib is not None and run.peak_reserved_gib is not None
        allocated.append(abs(predicted_memory_bytes(done, "allocated") / GIB / run.peak_memory_gib - 1))
        reserved.append(abs(predicted_memory_bytes(done, "reserved") / GIB / run.peak_reserved_gib - 1))
    assert len(allocated) == 16
    assert statistics.mean(allocated) < 0.003 and max(allocated) < 0.025
    assert statistics.mean(reserved) < 0.012 and max(reserved) < 0.03


def bytes_kept(
    settings: EngineSettings,
    recompute: Recompute,
    tp: int = 1,
    sequence_parallel: bool = False,
    precision: Precision = Precision.BF16,
) -> float:
    problem = dataclasses.replace(instances.problem(), engine_settings=settings)
    shape = LayerShape(
        kind=LayerKind.BLOCK, tp=tp, sequence_parallel=sequence_parallel, micro_batch=2, seq=128,
        precision=precision, recompute=recompute, kernel=settings.attention,
    )  # fmt: skip
    model = CostModel(problem)
    return model.layers.cost(shape).saved_bytes


def test_a_compiled_block_keeps_one_mlp_width_less() -> None:
    """But for the own runtime's, whose plans have to fit without a compiler as well."""
    for framework, less in (("another", 2 * 2 * 128 * 3 * 64), ("", 0)):
        each = (EngineSettings(compiled=compiled, framework=framework) for compiled in (False, True))
        eager, compiled = (bytes_kept(settings, Recompute.NONE) for settings in each)
        assert eager - compiled == less


def test_selective_recomputation_is_the_engines_own() -> None:
    """Of the core of attention it drops probabilities, of the MLP all between its norm and its result."""
    fused = EngineSettings(engine=Engine.MEGATRON, attention=AttentionKernel.FUSED)
    core = bytes_kept(fused, Recompute.NONE) - bytes_kept(fused, Recompute.SELECTIVE)
    assert core == pytest.approx(MEMORY_SPECS["probability_scale"].prior * 2 * 2 * 128 * 4 * 128)
    mlp = EngineSettings(selective=Selective.MLP)
    dropped = bytes_kept(mlp, Recompute.NONE) - bytes_kept(mlp, Recompute.SELECTIVE)
    assert dropped == 2 * 2 * 128 * 4 * 3 * 64


def test_torchtitan_keeps_every_second_product() -> None:
    """And its input, attention's result and its 4 statistics: q, v, the first up projection, the last."""
    kept = bytes_kept(EngineSettings(engine=Engine.TORCHTITAN), Recompute.SELECTIVE)
    values = 64 + 64 + (64 + 64 + 3 * 64 + 64)
    assert kept == 2 * 128 * (2 * values + 4 * 4)


def test_torchtitan_keeps_no_product_in_fp8() -> None:
    """Its list of what is kept has mm, not the scaled products of fp8: input and attention's result stay."""
    kept = bytes_kept(EngineSettings(engine=Engine.TORCHTITAN), Recompute.SELECTIVE, precision=Precision.FP8)
    assert kept == 2 * 128 * (2 * (64 + 64) + 4 * 4)


def test_a_fused_loss_takes_8_bytes_a_logit_and_megatron_a_weight_gradient() -> None:
    fused = memory_constants(
        dataclasses.replace(instances.problem(), engine_settings=EngineSettings(fused_loss=True))
    )
    assert (fused.loss_bytes, memory_constants(instances.problem()).loss_bytes) == (8, 12)
    shape = LayerShape(
        kind=LayerKind.BLOCK, tp=2, sequence_parallel=False, micro_batch=2, seq=128, precision=Precision.BF16
    )
    megatron, deepspeed = (
        CostModel(
            dataclasses.replace(instances.problem(), engine_settings=EngineSettings(engine=engine))
        ).layers.cost(shape)
        for engine in (Engine.MEGATRON, Engine.DEEPSPEED)
    )
    more = megatron.backward_transient_bytes - deepspeed.backward_transient_bytes
    assert more == 2 * (2 * 3 * 64) * 64 / 2


def test_liger_keeps_no_logits_but_gradients() -> None:
    """The loss over chunks: the gradient of the head's input and of its weights stay, and a chunk lives."""
    problem = dataclasses.replace(
        instances.problem(), engine_settings=EngineSettings(engine=Engine.NATIVE, liger=True)
    )
    model, tokens = problem.model, 2 * 128
    shape = LayerShape(
        kind=LayerKind.HEAD, tp=1, sequence_parallel=False, micro_batch=2, seq=128, precision=Precision.BF16
    )
    cost = CostModel(problem).layers.cost(shape)
    stream = 2 * tokens * 2 * model.hidden
    assert cost.saved_bytes == stream + 2 * model.hidden * (tokens + model.vocab)
    assert cost.forward_transient_bytes == 12 * model.vocab * tokens / (model.vocab / model.hidden)
    assert bytes_kept(EngineSettings(), Recompute.NONE) - bytes_kept(
        EngineSettings(liger=True), Recompute.NONE
    ) == (2 * 2 * 128 * 3 * 64)


def own_head(micro_batch: int, tp: int = 1, compiled: bool = False, framework: str = "") -> LayerCost:
    """A head in bf16 on a device that runs this project's runtime, or another program alike."""
    settings = EngineSettings(compiled=compiled, framework=framework)
    shape = LayerShape(
        kind=LayerKind.HEAD, tp=tp, sequence_parallel=False, micro_batch=micro_batch, seq=128,
        precision=Precision.BF16,
    )  # fmt: skip
    return CostModel(dataclasses.replace(instances.problem(), engine_settings=settings)).layers.cost(shape)


def test_the_own_runtime_keeps_gradients_of_the_head_and_a_chunk_of_logits() -> None:
    model, tokens = instances.problem().model, 2 * 128
    for tp in (1, 2):
        cost, columns = own_head(2, tp), model.vocab // tp
        stream = 2 * tokens * 2 * model.hidden
        assert cost.saved_bytes == stream + 2 * model.hidden * (tokens + columns)
        assert cost.forward_transient_bytes == 8 * columns * tokens, "one chunk, eager"
        assert own_head(2, tp, compiled=True) == cost
    many = round(3.5 * CHUNK_BYTES / (4 * 128 * model.vocab))  # several chunks, all full but the last
    assert own_head(many).forward_transient_bytes == 8 * CHUNK_BYTES / 4
    assert own_head(many, framework="another").saved_bytes > own_head(many).saved_bytes


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize("selective", Selective)
def test_recomputing_more_never_keeps_more(engine: Engine, selective: Selective) -> None:
    for attention, tp in itertools.product(AttentionKernel, (1, 2)):
        settings = EngineSettings(engine=engine, selective=selective, attention=attention)
        kept = [bytes_kept(settings, option, tp, tp > 1) for option in Recompute]
        assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("engine", Engine)
def test_sequence_parallel_inputs_stay_whole_except_megatrons(engine: Engine) -> None:
    """Both gathered inputs of a block are kept; Megatron gathers them again, and fuses its activation."""
    block = instances.dense_block(64)
    sharded = block.saved_bytes(2 * 128, 128, tp=2, sequence_parallel=True)
    gathered, fused = 2 * (2 * 128 * 64), 2 * 2 * 128 * 3 * 64 / 2
    more = -fused if engine is Engine.MEGATRON else gathered
    assert bytes_kept(EngineSettings(engine=engine), Recompute.NONE, 2, True) == sharded + more


def head_bytes(engine: Engine, tp: int) -> float:
    """What the head takes at the worst moment of its loss."""
    problem = dataclasses.replace(instances.problem(), engine_settings=EngineSettings(engine=engine))
    shape = LayerShape(
        kind=LayerKind.HEAD, tp=tp, sequence_parallel=False, micro_batch=2, seq=128,
        precision=Precision.BF16,
    )  # fmt: skip
    cost = CostModel(problem).layers.cost(shape)
    return cost.saved_bytes + cost.backward_transient_bytes


def test_a_loss_over_gathered_logits_is_not_shared_out() -> None:
    """Megatron's shares out 12 bytes a logit; DeepSpeed's pipelines take 16 of all, 6 more to gather them."""
    problem = instances.problem()
    logits, stream = 2 * 128 * problem.model.vocab, 2 * 2 * 128 * 2 * problem.model.hidden
    for tp in (1, 2, 4):
        assert head_bytes(Engine.MEGATRON, tp) == pytest.approx(stream + 12 * logits / tp)
        assert head_bytes(Engine.DEEPSPEED, tp) == pytest.approx(stream + (16 if tp == 1 else 22) * logits)


def test_only_fitted_constants_change_a_measured_layer() -> None:
    """Constants at their priors leave an eager native block as the formula has it."""
    problem = instances.problem()
    shape = LayerShape(
        kind=LayerKind.BLOCK, tp=1, sequence_parallel=False, micro_batch=2, seq=128,
        precision=Precision.BF16,
    )  # fmt: skip
    cost = CostModel(problem).layers.cost(shape)
    again = engine_bytes(cost, problem.model, shape, problem.engine_settings, memory_constants(problem))
    assert again.saved_bytes == cost.saved_bytes == instances.dense_block(64).saved_bytes(256, 128)


# Laws of the whole


DEGREES = [
    Degrees(dp_shard=2, zero=Zero.PARAMETERS, num_micro_batches=2),
    Degrees(tp=2, pp=2, num_micro_batches=4),
    Degrees(pp=2, dp_replicate=2, num_micro_batches=4),
    Degrees(num_micro_batches=4),
]


@pytest.mark.parametrize("engine", Engine)
@pytest.mark.parametrize("degrees", DEGREES, ids=lambda d: d.label())
def test_the_peak_covers_every_moment_and_observers_agree(engine: Engine, degrees: Degrees) -> None:
    """Tensors are within what is reserved, that within the driver's; no moment exceeds the peak."""
    problem = dataclasses.replace(
        instances.problem(batch=degrees.batch), engine_settings=EngineSettings(engine=engine)
    )
    done = evaluated(problem, degrees)
    figures, peak = done.estimate.memory, done.estimate.peak_memory_bytes
    assert figures is not None
    kinds = [predicted_memory_bytes(done, str(kind)) for kind in MemoryKind]
    assert kinds == sorted(kinds) and kinds[-1] > peak >= kinds[1]
    assert max(moment.device_bytes for moment in figures.moments) == peak
    assert [moment.moment for moment in figures.moments] == [
        "load", "forward_backward", "optimizer_step", "checkpoint_save", "resume"
    ]  # fmt: skip
    assert figures.worst in {moment.moment for moment in figures.moments}
    save = next(moment for moment in figures.moments if moment.moment == "checkpoint_save")
    assert figures.host_bytes == save.host_bytes


@pytest.mark.parametrize("engine", Engine)
def test_more_tokens_never_take_less(engine: Engine) -> None:
    peaks = []
    for micro_batch in (1, 2, 4, 8):
        degrees = dataclasses.replace(DEGREES[1], micro_batch=micro_batch)
        problem = dataclasses.replace(
            instances.problem(batch=degrees.batch), engine_settings=EngineSettings(engine=engine)
        )
        peaks.append(evaluated(problem, degrees).estimate.peak_memory_bytes)
    assert peaks == sorted(peaks)


def test_a_communicator_for_each_axis() -> None:
    assert process_groups(Degrees()) == 0
    assert process_groups(Degrees(tp=4), copied=1) == 2
    assert process_groups(Degrees(tp=2, pp=2, dp_replicate=2, dp_shard=4, zero=Zero.PARAMETERS)) == 4


# Verdicts


def test_more_memory_never_makes_a_verdict_worse() -> None:
    order = [Verdict.NO, Verdict.RISKY, Verdict.SAFE]
    for band in (ErrorBand(lower=0.02, upper=0.1), ErrorBand(lower=0.3, upper=0.0)):
        found = [order.index(verdict(1000, limit, band)) for limit in range(500, 1500, 10)]
        assert found == sorted(found) and set(found) >= {0, 2}


def test_the_band_is_the_profiles_where_it_has_one() -> None:
    problem, coverage = instances.problem(), Coverage(datasheet=1.0)
    assert memory_band(problem, coverage) == ErrorBand(lower=0.15, upper=0.15)
    fitted = with_profile(problem, memory_error_upper=0.06, memory_error_lower=0.02)
    assert memory_band(fitted, coverage) == ErrorBand(lower=0.02, upper=0.06)


def test_what_tensors_may_take_is_just_safe() -> None:
    """The solver's limit of tensors, with slack and runtime on top, is the largest peak that is SAFE."""
    problem = with_profile(instances.problem(), allocator_slack=1.1, memory_error_upper=0.05)
    coverage, runtime = Coverage(datasheet=1.0), 1000.0
    tensors = safe_tensor_bytes(problem, coverage, runtime) - runtime
    band = memory_band(problem, coverage)
    peak = 1.1 * tensors + runtime
    assert peak == pytest.approx(safe_peak_bytes(problem.memory_limit_bytes, band))
    assert verdict(peak * 0.999, problem.memory_limit_bytes, band) is Verdict.SAFE
    assert verdict(peak * 1.001, problem.memory_limit_bytes, band) is Verdict.RISKY


# Calibration


def sweep(truth: PlanningProblem) -> list[Run]:
    """Layouts of one model on A100s, of which those ran out that the constants of `truth` do not let fit."""
    runs = []
    grid = itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4), (32, 40))
    for number, (tp, pp, micro_batch, layers) in enumerate(grid):
        run = Run(
            id=str(number), where="", group=f"g{layers}", layers=layers, hidden=5120, ffn=13824, heads=40,
            kv_heads=40, vocab=32000, gated_mlp=True, tied_embeddings=False, seq_len=2048,
            device="a100-sxm-80gb", nodes=4, gpus_per_node=8, network="hdr200x8", framework="DeepSpeed",
            precision="bf16", attention=AttentionKernel.FLASH, fused_kernels="rms", tp=tp, pp=pp,
            dp=32 // tp // pp, zero=1, micro_batch=micro_batch, global_batch=512, status=Status.OK,
        )  # fmt: skip
        setup = run_problem(run, truth.profile)
        assert isinstance(setup, RunSetup)
        peak = CostModel(setup.problem).evaluate(setup.strategy).estimate.peak_memory_bytes
        status = Status.OOM if peak > setup.problem.memory_limit_bytes else Status.OK
        runs.append(dataclasses.replace(run, status=status, step_time_s=1.0))
    return runs


def test_a_band_is_found_from_which_runs_ran_out() -> None:
    """Ends alone tell enough that no left-out run is SAFE that ran out, or NO that ran."""
    truth = with_profile(instances.problem(), activation_scale=1.2)
    runs = sweep(truth)
    assert {run.status for run in runs} == {Status.OK, Status.OOM}
    base = with_profile(instances.problem()).profile
    assert base is not None
    (found,) = calibrate_memory(runs, base)
    values = {c.name: c.value for c in found.constants if not c.kernels}
    upper, lower = values["memory_error_upper"], values["memory_error_lower"]
    for run, ratio in zip(found.runs, found.left_out, strict=True):
        judged = verdict(ratio, 1.0, ErrorBand(lower=lower, upper=upper))
        assert judged is not (Verdict.SAFE if run.ran_out else Verdict.NO)
    assert 0.02 <= upper < 0.12 and math.isfinite(lower)


def test_verdicts_of_a_model_that_was_not_fitted() -> None:
    """Layouts of LLaMA-30B on 256 A100, judged by those of 13B and 65B: SAFE never runs out."""
    runs = read_runs([REFERENCE.with_name("layout_sweeps.csv")]).runs
    base = with_profile(instances.problem()).profile
    assert base is not None
    (found,) = calibrate_memory([run for run in runs if run.model != "LLaMA-30B"], base)
    profile = with_constants(base, found.constants)
    held = [run for run in runs if run.model == "LLaMA-30B"]
    counts = validate(held, lambda device: profile).verdicts
    total = sum(counts.values())
    assert total == 166 and counts["safe_oom"] == 0
    assert counts["no_ran"] / total < 0.02
    assert (counts["risky_ran"] + counts["risky_oom"]) / total < 0.12


def test_constants_are_found_from_measured_peaks() -> None:
    """Allocated peaks tell the scale of activations and the bytes of gradients."""
    truth = with_profile(instances.problem(), activation_scale=1.3, grad_bytes=4.0)
    runs = []
    for run in sweep(truth):
        setup = run_problem(run, truth.profile)
        assert isinstance(setup, RunSetup)
        done = CostModel(setup.problem).evaluate(setup.strategy)
        peak = predicted_memory_bytes(done, "allocated") / GIB
        kind = MemoryKind.ALLOCATED
        runs.append(dataclasses.replace(run, status=Status.OK, peak_memory_gib=peak, memory_kind=kind))
    base = with_profile(instances.problem()).profile
    assert base is not None
    (found,) = calibrate_memory(runs, base)
    values = {c.name: c.value for c in found.constants if not c.kernels}
    assert values["activation_scale"] == pytest.approx(1.3, rel=0.03)
    assert values["grad_bytes"] == pytest.approx(4.0, rel=0.05)
    assert max(abs(ratio - 1) for ratio in found.left_out) < 0.02
