"""The reader of runs.csv, and what a row says of a problem and a strategy."""

from __future__ import annotations

import csv
import dataclasses
import random
from pathlib import Path

import pytest

from planner.attention import Attention
from planner.cost.evaluate import CostModel
from planner.errors import InputError
from planner.estimate import Rejected, Verdict
from planner.feed_forward import Experts
from planner.kept import AttentionKernel
from planner.model import Block, Norm
from planner.runs.run import MemoryKind, Run, RunRecompute, Status
from planner.runs.setup import RunSetup, Setups, run_problem
from planner.runs.table import READERS, read_runs
from planner.stack import Dispatch, Engine, Selective
from planner.strategy import CpExchange, Offload, Recompute, Schedule, Zero
from planner.validation import validate
from planner.workload import Method, Precision

DATA = Path(__file__).parents[1] / "bench" / "data"

GPT = Run(
    id="gpt",
    where="runs.csv: line 2",
    layers=24,
    hidden=2048,
    ffn=8192,
    heads=16,
    kv_heads=16,
    vocab=51200,
    gated_mlp=False,
    tied_embeddings=True,
    seq_len=1024,
    device="a100-sxm-80gb",
    nodes=1,
    gpus_per_node=8,
    framework="Megatron-LM",
    precision="fp16",
    tp=2,
    pp=2,
    dp=2,
    zero=0,
    recompute=RunRecompute.FULL,
    micro_batch=2,
    global_batch=32,
    status=Status.OK,
    step_time_s=1.0,
)
LLAMA = dataclasses.replace(
    GPT,
    id="llama",
    ffn=5632,
    kv_heads=4,
    gated_mlp=True,
    tied_embeddings=False,
    framework="TorchTitan (FSDP2)",
    precision="bf16",
    zero=3,
    pp=1,
    dp=4,
    recompute=RunRecompute.NONE,
)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def setup(run: Run) -> RunSetup:
    made = run_problem(run, None)
    assert isinstance(made, RunSetup), made
    return made


def reason(run: Run, **changes: object) -> Rejected:
    made = run_problem(dataclasses.replace(run, **changes), None)  # type: ignore[arg-type]
    assert isinstance(made, Rejected), made
    return made


# The reader


def test_cells_are_typed_and_empty_ones_unknown(tmp_path: Path) -> None:
    file = write(
        tmp_path / "runs.csv",
        "id,layers,gated_mlp,compile,network,attention,recompute,status,step_time_s,memory_kind,quality,device",
        "a,40.0,True,,none,flash,mlp,oom,,reserved,A,h100-sxm-80gb",
        "b,nan,0,yes,,FUSED,,ok,1.5e-1,,B,",
        "",
    )
    first, second = read_runs([file]).runs
    assert (first.layers, first.gated_mlp, first.compile, first.network) == (40, True, None, "none")
    assert (first.attention, first.recompute) == (AttentionKernel.FLASH, RunRecompute.MLP)
    assert (first.status, first.step_time_s, first.memory_kind) == (Status.OOM, None, MemoryKind.RESERVED)
    assert (second.layers, second.gated_mlp, second.compile, second.step_time_s) == (None, False, True, 0.15)
    assert second.where == f"{file}: line 3"


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        ("layers", "many", ("'many' is not a number",)),
        ("layers", "1.5", ("is 1.5", "whole number from 1 to 10000")),
        ("layers", "1e300", ("1e300",)),
        ("tp", "0", ("is 0", "from 1")),
        ("tp", "inf", ("is inf",)),
        ("zero", "4", ("from 0 to 3",)),
        ("step_time_s", "-1", ("is -1", "above 0")),
        ("step_time_s", "1,5", ("is not a number",)),
        ("gated_mlp", "perhaps", ("neither true nor false",)),
        ("attention", "sdpa", ("flash, fused, eager",)),
        ("status", "killed", ("ok, oom, error",)),
        ("recompute", "some", ("none, selective, full, mlp",)),
    ],
)
def test_a_bad_cell_is_named_with_line_and_column(
    tmp_path: Path, column: str, cell: str, words: tuple[str, ...]
) -> None:
    file = write(tmp_path / "runs.csv", f"id,device,{column}", "a,t4,", f'b,t4,"{cell}"')
    with pytest.raises(InputError) as caught:
        read_runs([file])
    (problem,) = caught.value.problems
    assert problem.where == f"{file}: line 3, column {column}"
    for word in words:
        assert word in str(problem)


def test_all_faults_of_all_files_are_listed(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", "device,tp,pp", "t4,x,y")
    second = write(tmp_path / "b.csv", "device,tp", "t4,1,2,3")
    with pytest.raises(InputError) as caught:
        read_runs([first, second, tmp_path / "c.csv"])
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for words in ("column tp", "column pp", "has 4 cells, the header has 2", "no such file"):
        assert words in text


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("",), "is not the header"),
        (("name,value", "a,1"), "is not the header of a table of runs: it begins with name, value"),
        (("device,tp,tp", "t4,1,2"), "column 'tp' twice"),
        (("device,tp",), "holds no run"),
        (('device,tp\n"t4,1',), "is not a CSV file"),
    ],
)
def test_a_file_that_is_no_table_of_runs_is_refused(
    tmp_path: Path, lines: tuple[str, ...], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read_runs([write(tmp_path / "runs.csv", *lines)])


def test_a_misspelt_column_is_warned_of_and_others_are_not(tmp_path: Path) -> None:
    table = read_runs([write(tmp_path / "runs.csv", "device,microbatch,quality,loss", "t4,1,A,2.5")])
    (warning,) = table.warnings
    assert "'microbatch' is not read; did you mean 'micro_batch'" in warning


def test_a_group_that_is_not_stated_is_made_of_what_makes_runs_comparable() -> None:
    assert dataclasses.replace(GPT, group="g").group_name == "g"
    assert dataclasses.replace(GPT, tp=8, dp=1, pp=1, micro_batch=1).group_name == GPT.group_name
    for changes in ({"hidden": 4096}, {"seq_len": 2048}, {"nodes": 2}, {"fused_kernels": "fused"}):
        assert dataclasses.replace(GPT, **changes).group_name != GPT.group_name


# Problems and strategies


def test_a_gpt_row_is_the_gpt_of_its_dimensions() -> None:
    made = setup(GPT)
    h, v, s = 2048, 51200, 1024
    model = made.problem.model
    # Narayanan 2021: 12 l h^2 (1 + 13 / 12 h) + (V + s) h, and the final norm.
    assert model.params_total == 24 * (12 * h * h + 13 * h) + (v + s) * h + 2 * h
    block = model.segments[0].block
    assert isinstance(block, Block) and block.norm is Norm.LAYERNORM
    degrees = made.strategy.degrees
    assert (degrees.tp, degrees.pp, degrees.dp, degrees.dp_replicate) == (2, 2, 2, 2)
    assert (degrees.zero, degrees.schedule) == (Zero.NONE, Schedule.ONE_F_ONE_B)
    assert (degrees.micro_batch, degrees.num_micro_batches) == (2, 8)
    assert [stage.recompute.full for stage in made.strategy.stages] == [12, 12]
    assert made.problem.workload.precision is Precision.FP16
    assert made.problem.stack.engine is Engine.MEGATRON
    assert made.problem.stack.attention is AttentionKernel.FUSED


def test_a_llama_row_is_gated_without_biases_and_shards_parameters() -> None:
    made = setup(dataclasses.replace(LLAMA, dp_replicate=2, compile=True))
    block = made.problem.model.segments[0].block
    assert isinstance(block, Block) and isinstance(block.mixer, Attention)
    assert (block.norm, block.mixer.qkv_bias, block.mixer.kv_heads) == (Norm.RMSNORM, False, 4)
    assert made.problem.model.learned_positions == 0
    degrees = made.strategy.degrees
    assert (degrees.dp_shard, degrees.dp_replicate, degrees.zero) == (2, 2, Zero.PARAMETERS)
    stack = made.problem.stack
    assert (stack.engine, stack.attention, stack.compiled) == (
        Engine.TORCHTITAN,
        AttentionKernel.FLASH,
        True,
    )
    assert degrees.sequence_parallel, "torchtitan's own default"


def test_stated_software_wins_over_defaults() -> None:
    run = dataclasses.replace(
        LLAMA, attention=AttentionKernel.EAGER, fused_kernels="torch", sequence_parallel=False
    )
    made = setup(run)
    assert (made.problem.stack.attention, made.problem.stack.kernels) == (AttentionKernel.EAGER, "torch")
    assert not made.strategy.degrees.sequence_parallel
    assert made.assumed == ()


def test_what_is_assumed_is_listed() -> None:
    run = dataclasses.replace(GPT, vocab=None, ffn=None, recompute=None, zero=None, dp=None)
    made = setup(run)
    assert made.problem.model.vocab == 50432, "GPT-2's tokens, padded for two tensor-parallel ranks"
    for text in ("vocab 50257", "ffn 8192", "recompute none", "zero 0", "dp 2", "attention fused"):
        assert text in made.assumed


@pytest.mark.parametrize(
    ("changes", "rule", "words"),
    [
        ({"status": Status.ERROR}, "status", "error"),
        ({"device": ""}, "row_complete", "device unknown"),
        ({"device": "abacus"}, "cluster_known", "no device 'abacus'"),
        ({"network": "string"}, "cluster_known", "string"),
        ({"seq_len": None}, "row_complete", "seq_len"),
        ({"hidden": None}, "model_known", "hidden"),
        ({"gated_mlp": True, "ffn": None}, "model_known", "ffn"),
        ({"heads": 7}, "model_known", "7 heads"),
        ({"experts": 64, "topk": 2}, "model_known", "expert_ffn"),
        ({"experts": 8}, "model_known", "topk"),
        ({"notes": "precision bf16-true"}, "not_modelled", "bf16"),
        ({"micro_batch": None, "global_batch": None}, "row_complete", "global_batch"),
        ({"micro_batch": None, "dp": 3}, "world_size", "12 devices of 8"),
        ({"micro_batch": None, "global_batch": 31}, "batch_divides", "31"),
        ({"global_batch": None}, "row_complete", "global_batch"),
        ({"global_batch": 31}, "batch_divides", "31"),
        ({"dp": 3}, "world_size", "12 devices of 8"),
        ({"dp": 4}, "world_size", "16 devices of 8"),
        ({"tp": None, "pp": None, "dp": 2}, "world_size", "tp and pp unknown"),
        ({"precision": "int4"}, "precision", "int4 is not modelled"),
        ({"schedule": "chimera"}, "schedule", "chimera"),
        ({"chunks": 20}, "stages_within_layers", "40"),
        ({"zero": 1, "dp_replicate": 3}, "row_complete", "shards x 3"),
        ({"notes": "CPU offload of optimizer/params"}, "not_modelled", "parameters"),
        ({"notes": "ZeRO 3 + CPU offload"}, "not_modelled", "not of what"),
        ({"notes": "optimizer state on CPU, activation offload"}, "not_modelled", "several kinds"),
        ({"head": False}, "ends", "without the head"),
        ({"micro_batch": 1, "global_batch": 10**9}, "row_complete", "too many"),
    ],
)
def test_a_row_that_cannot_be_predicted_says_why(changes: dict[str, object], rule: str, words: str) -> None:
    refused = reason(GPT, **changes)
    assert refused.rule == rule
    assert words in refused.detail


def test_words_that_deny_offloading_do_not_count() -> None:
    assert setup(dataclasses.replace(GPT, notes="act CPU offload False"))


def sizes(**changes: object) -> list[int]:
    return [stage.layers for stage in setup(dataclasses.replace(GPT, **changes)).strategy.stages]  # type: ignore[arg-type]


def test_embedding_and_head_take_a_layers_place_where_only_so_stages_are_equal() -> None:
    """Zero Bubble's 22 layers on 8 stages."""
    eight = {"tp": 1, "pp": 8, "dp": 1, "micro_batch": 1, "global_batch": 8}
    assert sizes(layers=22, framework="Megatron-LM", **eight) == [2, 3, 3, 3, 3, 3, 3, 2]
    assert sizes(layers=24, framework="Megatron-LM", **eight) == [3] * 8
    assert sizes(layers=23, framework="Megatron-LM", **eight) == [3, 3, 3, 3, 3, 3, 3, 2]
    assert sizes(layers=9, framework="Megatron-LM", **eight) == [2, 1, 1, 1, 1, 1, 1, 1]


def test_embedding_norm_and_head_are_dealt_out_as_layers_where_the_framework_does_so() -> None:
    """Scaling's pipe_partition_uniform over 43 and 83 layers."""
    four = {"framework": "AA-Scaling (Aleph Alpha)", "tp": 1, "micro_batch": 1, "global_batch": 8}
    assert sizes(layers=40, pp=2, dp=4, **four) == [21, 19]
    assert sizes(layers=40, pp=4, dp=2, **four) == [10, 11, 11, 8]
    assert sizes(layers=80, pp=8, dp=1, **four) == [10, 11, 11, 10, 10, 10, 10, 8]
    assert sizes(layers=40, pp=1, dp=8, **four) == [40]


def test_words_of_a_run_say_what_it_offloads() -> None:
    assert setup(GPT).strategy.offloads == ()
    for notes, offload in (
        ("optimizer state on CPU", Offload.OPTIMIZER),
        ("ZeRO-Offload: offloads the optimizer", Offload.OPTIMIZER),
        ("activation offloading required", Offload.ACTIVATIONS),
    ):
        assert setup(dataclasses.replace(GPT, notes=notes)).strategy.offloads == (offload,)
    assert setup(dataclasses.replace(GPT, framework="DeepSpeed + Liger")).problem.stack.liger


def test_degrees_that_are_left_out_follow_from_the_devices() -> None:
    alone = setup(dataclasses.replace(GPT, tp=None, pp=None, dp=8))
    assert (alone.strategy.degrees.tp, alone.strategy.degrees.pp) == (1, 1)
    filled = setup(dataclasses.replace(GPT, tp=None))
    assert filled.strategy.degrees.tp == 2


def test_chunks_make_an_interleaved_pipeline() -> None:
    degrees = setup(dataclasses.replace(GPT, chunks=3)).strategy.degrees
    assert (degrees.schedule, degrees.chunks, degrees.stages) == (Schedule.INTERLEAVED, 3, 6)
    flat = setup(dataclasses.replace(LLAMA, chunks=3)).strategy.degrees
    assert (flat.schedule, flat.chunks) == (Schedule.ONE_F_ONE_B, 1), "one stage holds no chunks"


def test_a_share_that_does_not_divide_becomes_equal_micro_batches() -> None:
    degrees = setup(dataclasses.replace(GPT, micro_batch=5)).strategy.degrees
    assert (degrees.micro_batch, degrees.num_micro_batches) == (4, 4)
    assert degrees.batch == 32


def test_memory_alone_needs_no_global_batch() -> None:
    run = dataclasses.replace(GPT, global_batch=None, step_time_s=None, peak_memory_gib=10.0)
    assert setup(run).strategy.degrees.num_micro_batches == 1


def test_a_vocabulary_that_does_not_split_is_padded_as_megatron_pads() -> None:
    made = setup(dataclasses.replace(GPT, vocab=50257))
    assert made.problem.model.vocab == 50432, "the next multiple of 128 x tp 2"
    assert setup(dataclasses.replace(LLAMA, vocab=50304)).problem.model.vocab == 50304


def test_a_stage_alone_has_no_ends() -> None:
    made = setup(dataclasses.replace(GPT, embedding=False, head=False))
    assert made.problem.model.vocab == made.problem.model.params_embedding == 0
    headed = setup(dataclasses.replace(LLAMA, embedding=False, head=True))
    assert headed.problem.model.tied_embeddings


def test_a_name_of_the_catalog_gives_what_the_row_leaves_open() -> None:
    bare = dataclasses.replace(
        LLAMA,
        model="LLAMA3.1_8B",
        **dict.fromkeys(("layers", "hidden", "ffn", "heads", "kv_heads", "vocab")),  # type: ignore[arg-type]
    )
    assert setup(bare).problem.model.params_total == 8_030_261_248
    fewer = setup(dataclasses.replace(bare, model="Llama 3.1 8B truncated to 4 layers", layers=4))
    assert fewer.problem.model.layers == 4
    experts = setup(dataclasses.replace(bare, model="Mixtral 8x7B", experts=8, topk=2, tp=1, dp=8))
    block = experts.problem.model.segments[0].block
    assert isinstance(block, Block) and isinstance(block.mlp, Experts)


@pytest.mark.parametrize(
    ("size", "pp", "layers"), [("200B", 10, 80), ("205B", 9, 81), ("195B", 11, 77), ("183B", 12, 72)]
)
def test_a_models_size_tells_its_layers(size: str, pp: int, layers: int) -> None:
    """BLOOM's team tried GPTs of width 14,400 whose layers it made divide by the stages, and lists sizes."""
    large = {"layers": None, "hidden": 14400, "ffn": 57600, "heads": 100, "kv_heads": 100, "vocab": 250000}
    nodes = {"tp": 8, "pp": pp, "dp": 4, "nodes": 4 * pp, "global_batch": 2048}
    made = setup(dataclasses.replace(GPT, model=f"GPT {size}", **large, **nodes))  # type: ignore[arg-type]
    assert made.problem.model.layers == layers
    assert f"layers {layers}, of {size} parameters" in made.assumed
    assert reason(GPT, **large, model="GPT").rule == "model_known"


def test_few_experts_are_whole_mlps() -> None:
    made = setup(dataclasses.replace(GPT, experts=8, topk=2, notes="LoRA, bf16-true"))
    block = made.problem.model.segments[0].block
    assert isinstance(block, Block) and isinstance(block.mlp, Experts)
    assert (block.mlp.expert.width, block.mlp.count) == (8192, 8)
    assert "expert_ffn 8192" in made.assumed


def test_jax_compiles_and_words_that_deny_it_count() -> None:
    for framework, notes, compiled in (
        ("MaxText (JAX)", "", True),
        ("PyTorch FSDP", "torch.compile", True),
        ("PyTorch FSDP", "no torch.compile", False),
        ("Megatron-LM", "", False),
    ):
        run = dataclasses.replace(GPT, framework=framework, notes=notes, zero=1)
        assert setup(run).problem.stack.compiled is compiled


def test_dimensions_win_over_a_name_that_contradicts_them() -> None:
    other = setup(dataclasses.replace(LLAMA, model="llama-3.1-8b"))
    assert other.problem.model.hidden == 2048


def test_a_model_cell_is_never_opened_as_a_path(tmp_path: Path) -> None:
    secret = write(tmp_path / "config.json", "{")
    refused = reason(GPT, model=str(secret), layers=None)
    assert "not in the catalog" in refused.detail


def test_recompute_of_the_mlp_is_selective_of_that_part() -> None:
    made = setup(dataclasses.replace(GPT, recompute=RunRecompute.MLP))
    assert made.strategy.stages[0].recompute.options()[0] is Recompute.SELECTIVE
    assert made.problem.stack.recomputes is Selective.MLP
    other = setup(dataclasses.replace(GPT, recompute=RunRecompute.SELECTIVE))
    assert other.problem.stack.recomputes is Selective.ATTENTION


def test_words_of_a_row_say_how_it_was_trained() -> None:
    assert setup(GPT).problem.workload.method is Method.PRETRAIN
    assert setup(dataclasses.replace(GPT, model="GPT SFT")).problem.workload.method is Method.FINETUNE
    made = setup(dataclasses.replace(GPT, framework="NeMo", model="GPT LoRA"))
    assert made.problem.workload.method is Method.LORA
    assert made.problem.workload.adapters and any("LoRA of rank" in text for text in made.assumed)
    assert reason(GPT, notes="QLoRA").rule == "not_modelled"


def test_one_rank_keeps_the_wrapper_that_shards_parameters_and_no_other() -> None:
    alone = {"nodes": 1, "gpus_per_node": 1, "tp": 1, "pp": 1, "dp": 1}
    for zero, kept in ((0, Zero.NONE), (1, Zero.NONE), (2, Zero.NONE), (3, Zero.PARAMETERS)):
        run = dataclasses.replace(GPT, zero=zero, **alone)  # type: ignore[arg-type]
        assert setup(run).strategy.degrees.zero is kept


def test_a_micro_batch_that_is_left_out_is_the_fastest_that_fits() -> None:
    open_run = dataclasses.replace(GPT, micro_batch=None)
    made = setup(open_run)
    stated = [setup(dataclasses.replace(GPT, micro_batch=size)) for size in (1, 2, 4, 8, 16)]
    done = {each.strategy: CostModel(each.problem).evaluate(each.strategy).estimate for each in stated}
    fitting = [each for each, estimate in done.items() if estimate.verdict is Verdict.SAFE]
    assert made.strategy == min(fitting, key=lambda each: done[each].step_time_s)
    size = made.strategy.degrees.micro_batch
    assert made.assumed[0] == f"micro_batch {size}, the fastest that fits"
    long = setup(dataclasses.replace(open_run, seq_len=16384, recompute=RunRecompute.NONE))
    assert long.strategy.degrees.micro_batch < size, "longer sequences leave memory for fewer of them"
    one = dataclasses.replace(open_run, global_batch=2)
    assert (
        setup(one).assumed[0]
        == setup(dataclasses.replace(one, status=Status.OOM)).assumed[0]
        == "micro_batch 1"
    )
    assert reason(open_run, status=Status.OOM).detail == "micro_batch unknown, and the run did not fit."


def test_torchtitan_splits_a_share_into_as_many_micro_batches_as_stages() -> None:
    """And keeps weights gathered in a pipeline; of schedules with several stages a rank it has two."""
    piped = dataclasses.replace(LLAMA, pp=4, dp=1, tp=2, micro_batch=None, global_batch=32)
    degrees = setup(piped).strategy.degrees
    assert (degrees.micro_batch, degrees.num_micro_batches, degrees.chunks) == (8, 4, 1)
    wide = dataclasses.replace(piped, nodes=2, dp=2, notes="Interleaved 1F1B")
    degrees = setup(wide).strategy.degrees
    assert (degrees.micro_batch, degrees.num_micro_batches, degrees.chunks) == (4, 4, 2)
    assert degrees.schedule is Schedule.INTERLEAVED and degrees.zero is Zero.GRADIENTS


def test_a_micro_batch_is_chosen_though_none_fits() -> None:
    large = dataclasses.replace(GPT, micro_batch=None, hidden=16384, ffn=65536, heads=128, kv_heads=128)
    assert "none fits" in setup(large).assumed[0]


def test_megatrons_weak_scaling_is_predicted_though_it_states_no_micro_batch() -> None:
    """arXiv 2104.04473, table 1: 3.6 to 530 billion parameters on 64 to 2,520 A100, from priors alone."""
    runs = [run for run in read_runs([DATA / "tables.csv"]).runs if run.id.startswith("mlm21")]
    runs = [run for run in runs if run.micro_batch is None]
    errors = [row.error for row in validate(runs, lambda device: None).rows]
    assert len(errors) == 6 and all(error is not None and abs(error) < 0.1 for error in errors)


def test_every_row_gives_a_setup_or_a_reason_whatever_it_leaves_out() -> None:
    """Published rows with random cells emptied: never an exception, and a setup keeps its batch."""
    runs = read_runs([DATA / "tables.csv", DATA / "layout_sweeps.csv", DATA / "h100_reference.csv"]).runs
    rng = random.Random(7)
    setups, made = Setups(lambda device: None), 0
    for run in rng.sample(runs, 400):
        emptied = {name: Run.__dataclass_fields__[name].default for name in READERS if rng.random() < 0.05}
        emptied.pop("id", None)
        changed = dataclasses.replace(run, **emptied)
        result = setups.setup(changed)
        if isinstance(result, Rejected):
            assert result.detail
            continue
        made += 1
        degrees = result.strategy.degrees
        assert degrees.world == changed.devices
        assert changed.global_batch in (None, degrees.batch)
    assert made > 50


def test_bench_data_names_its_sources_and_every_column_is_read() -> None:
    for path in sorted(DATA.glob("*.csv")):
        with path.open(encoding="utf-8") as file:
            header = next(csv.reader(file))
        assert set(header) - set(READERS) <= {"stated", "quality"}, path
        table = read_runs([path])
        assert table.warnings == ()
        assert all(run.source and run.id for run in table.runs), path


# Context and expert parallelism, and what recipes of modern runs leave unsaid

MOE = dataclasses.replace(
    LLAMA,
    id="moe",
    layers=30,
    ffn=None,
    experts=16,
    topk=2,
    expert_ffn=1024,
    framework="Megatron-Bridge / Megatron-Core",
    device="gb200",
    nodes=4,
    gpus_per_node=4,
    network="nvl72",
    precision="fp8",
    tp=2,
    pp=1,
    dp=8,
    ep=8,
    zero=1,
    micro_batch=1,
    global_batch=64,
    recompute=None,
)


@pytest.mark.parametrize(
    ("framework", "notes", "exchange"),
    [
        ("Megatron-LM", "", CpExchange.RING),
        ("DeepSpeed", "", CpExchange.ALL_TO_ALL),
        ("TorchTitan (FSDP2)", "", CpExchange.GATHER),
        ("Megatron-LM", "DeepSpeed Ulysses attention", CpExchange.ALL_TO_ALL),
    ],
)
def test_the_exchange_of_context_ranks_is_the_engine_s(
    framework: str, notes: str, exchange: CpExchange
) -> None:
    run = dataclasses.replace(LLAMA, framework=framework, notes=notes, tp=1, dp=4, cp=2, zero=None)
    made = setup(run)
    assert made.strategy.degrees.cp_exchange is exchange
    assert (f"cp_exchange {exchange}" in made.assumed) is (notes == "")
    stated = setup(dataclasses.replace(run, cp_exchange="gather"))
    assert stated.strategy.degrees.cp_exchange is CpExchange.GATHER
    assert reason(run, cp_exchange="pigeon").rule == "cp_exchange"


def test_shards_of_an_expert_are_stated_or_the_framework_s() -> None:
    assert setup(MOE).strategy.degrees.etp == 1
    nemo = dataclasses.replace(MOE, framework="NeMo / Megatron-Core")
    assert setup(nemo).strategy.degrees.etp is None, "as many as tp"
    assert setup(dataclasses.replace(nemo, notes="DeepEP; ETP 1")).strategy.degrees.etp == 1
    assert setup(dataclasses.replace(MOE, etp=2)).strategy.degrees.etp == 2
    wide = dataclasses.replace(nemo, ep=16)
    assert setup(wide).strategy.degrees.etp == 1, "16 experts over 16 devices leave none for shards"


def test_words_and_recipes_say_how_tokens_are_sent() -> None:
    assert setup(MOE).problem.stack.dispatch is Dispatch.DEDUPLICATED
    nemo = dataclasses.replace(MOE, framework="NeMo / Megatron-Core")
    assert setup(nemo).problem.stack.dispatch is Dispatch.ALL_TO_ALL
    deep = dataclasses.replace(nemo, notes="DeepEP + 1F1B A2A overlap; force-balanced routing; fp8 dispatch")
    stack = setup(deep).problem.stack
    assert stack.dispatch is Dispatch.DEDUPLICATED and stack.dispatch_bytes == 1
    assert stack.overlaps_dispatch and stack.balanced and not stack.graphed
    assert not setup(nemo).problem.stack.balanced


@pytest.mark.parametrize(
    ("model", "container", "device", "precision", "graphed"),
    [
        ("Qwen3_30B_a3B", "26.06", "gb200", "fp8", True),
        ("Qwen3_30B_a3B", "26.04.01", "gb200", "fp8", False),
        ("Qwen3_30B_a3B", "26.08", "h100-sxm-80gb", "fp8", False),
        ("Qwen3_30B_a3B", "26.08", "gb200", "bf16", False),
        ("Kimi_K2", "26.06", "gb200", "fp8", False),
        ("Kimi_K2", "26.08", "gb200", "fp8", True),
    ],
)
def test_releases_that_replay_whole_steps(
    model: str, container: str, device: str, precision: str, graphed: bool
) -> None:
    run = dataclasses.replace(
        MOE,
        model=model,
        source=f"Megatron-Bridge performance summary ({container} NeMo Container)",
        device=device,
        network="",
        precision=precision,
    )
    stack = setup(run).problem.stack
    assert stack.graphed is stack.overlaps_dispatch is graphed


def test_recipes_interleave_where_a_row_leaves_it_open() -> None:
    """Two layers a chunk where they divide a rank's; embedding and head count as layers where they fit."""
    run = dataclasses.replace(MOE, experts=None, topk=None, expert_ffn=None, ffn=5632, ep=None, pp=4, dp=2)
    made = setup(run)
    degrees = made.strategy.degrees
    assert degrees.schedule is Schedule.INTERLEAVED and degrees.chunks == 4
    assert [stage.layers for stage in made.strategy.stages] == [1, *[2] * 14, 1]
    assert "chunks 4" in made.assumed and "1 layers on the end stages" in made.assumed
    assert setup(dataclasses.replace(run, chunks=1)).strategy.degrees.chunks == 1
    megatron = dataclasses.replace(run, framework="Megatron-LM", layers=32)
    assert setup(megatron).strategy.degrees.chunks == 1


def test_whole_layers_divide_where_they_can() -> None:
    stages = setup(dataclasses.replace(GPT, layers=22, pp=4, tp=2, dp=1)).strategy.stages
    assert [stage.layers for stage in stages] == [5, 6, 6, 5], "22 and the two ends are 4 x 6"
    stages = setup(dataclasses.replace(GPT, layers=24, pp=4, tp=2, dp=1)).strategy.stages
    assert [stage.layers for stage in stages] == [6, 6, 6, 6]


def test_jax_recomputes_blocks_unless_told_otherwise() -> None:
    jax = dataclasses.replace(LLAMA, framework="MaxText (JAX)", recompute=None)
    assert setup(jax).strategy.stages[0].recompute.full == 24
    assert "recompute full" in setup(jax).assumed
    assert (
        setup(dataclasses.replace(jax, recompute=RunRecompute.NONE)).strategy.stages[0].recompute.none == 24
    )


def test_recipes_of_nemo_reduce_gradients_behind_the_backward() -> None:
    assert setup(MOE).problem.stack.overlaps_gradients
    assert not setup(GPT).problem.stack.overlaps_gradients
