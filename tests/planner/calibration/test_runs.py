"""What a row of a table says of a problem and a strategy."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from planner.calibration.runs import READERS, RunRecompute, Status, read_runs
from planner.job.engine_settings import Dispatch, Engine, Selective
from planner.model.attention import Attention, CpExchange
from planner.model.feed_forward import Experts
from planner.model.spec import Block, Norm
from planner.model.sublayer import AttentionKernel, Recompute
from planner.model.workload import Method, Precision
from planner.strategy.strategy import Offload, Schedule, Zero
from tests.run_samples import GPT, LLAMA, reason, setup

DATA = Path(__file__).parents[3] / "bench" / "data"


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
    assert made.problem.engine_settings.engine is Engine.MEGATRON
    assert made.problem.engine_settings.attention is AttentionKernel.FUSED


def test_a_llama_row_is_gated_without_biases_and_shards_parameters() -> None:
    made = setup(dataclasses.replace(LLAMA, dp_replicate=2, compile=True))
    block = made.problem.model.segments[0].block
    assert isinstance(block, Block) and isinstance(block.mixer, Attention)
    assert (block.norm, block.mixer.qkv_bias, block.mixer.kv_heads) == (Norm.RMSNORM, False, 4)
    assert made.problem.model.learned_positions == 0
    degrees = made.strategy.degrees
    assert (degrees.dp_shard, degrees.dp_replicate, degrees.zero) == (2, 2, Zero.PARAMETERS)
    settings = made.problem.engine_settings
    assert (settings.engine, settings.attention, settings.compiled) == (
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
    assert (made.problem.engine_settings.attention, made.problem.engine_settings.kernels) == (
        AttentionKernel.EAGER,
        "torch",
    )
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
    assert setup(dataclasses.replace(GPT, framework="DeepSpeed + Liger")).problem.engine_settings.liger


def test_chunks_make_an_interleaved_pipeline() -> None:
    degrees = setup(dataclasses.replace(GPT, chunks=3)).strategy.degrees
    assert (degrees.schedule, degrees.chunks, degrees.stages) == (Schedule.INTERLEAVED, 3, 6)
    flat = setup(dataclasses.replace(LLAMA, chunks=3)).strategy.degrees
    assert (flat.schedule, flat.chunks) == (Schedule.ONE_F_ONE_B, 1), "one stage holds no chunks"


def test_a_stage_alone_has_no_ends() -> None:
    made = setup(dataclasses.replace(GPT, embedding=False, head=False))
    assert made.problem.model.vocab == made.problem.model.params_embedding == 0
    headed = setup(dataclasses.replace(LLAMA, embedding=False, head=True))
    assert headed.problem.model.tied_embeddings


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
        assert setup(run).problem.engine_settings.compiled is compiled


def test_dimensions_win_over_a_name_that_contradicts_them() -> None:
    other = setup(dataclasses.replace(LLAMA, model="llama-3.1-8b"))
    assert other.problem.model.hidden == 2048


def test_a_model_cell_is_never_opened_as_a_path(tmp_path: Path) -> None:
    secret = tmp_path / "config.json"
    secret.write_text("{", encoding="utf-8")
    refused = reason(GPT, model=str(secret), layers=None)
    assert "not in the catalog" in refused.detail


def test_recompute_of_the_mlp_is_selective_of_that_part() -> None:
    made = setup(dataclasses.replace(GPT, recompute=RunRecompute.MLP))
    assert made.strategy.stages[0].recompute.options()[0] is Recompute.SELECTIVE
    assert made.problem.engine_settings.recomputes is Selective.MLP
    other = setup(dataclasses.replace(GPT, recompute=RunRecompute.SELECTIVE))
    assert other.problem.engine_settings.recomputes is Selective.ATTENTION


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
    assert setup(MOE).problem.engine_settings.dispatch is Dispatch.DEDUPLICATED
    nemo = dataclasses.replace(MOE, framework="NeMo / Megatron-Core")
    assert setup(nemo).problem.engine_settings.dispatch is Dispatch.ALL_TO_ALL
    deep = dataclasses.replace(nemo, notes="DeepEP + 1F1B A2A overlap; force-balanced routing; fp8 dispatch")
    settings = setup(deep).problem.engine_settings
    assert settings.dispatch is Dispatch.DEDUPLICATED and settings.dispatch_bytes == 1
    assert settings.overlaps_dispatch and settings.balanced and not settings.graphed
    assert not setup(nemo).problem.engine_settings.balanced


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
    settings = setup(run).problem.engine_settings
    assert settings.graphed is settings.overlaps_dispatch is graphed


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
    assert setup(MOE).problem.engine_settings.overlaps_gradients
    assert not setup(GPT).problem.engine_settings.overlaps_gradients
