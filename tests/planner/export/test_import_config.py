"""Imports: exports come back as the same strategies, and what others wrote is read as the engine reads it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.commands.splitting.export import TO
from planner.commands.splitting.import_config import FROM
from planner.export.imported import Imported, completed, read_config
from planner.export.megatron import layout_sizes, layout_text
from planner.export.settings import Recipe, Settings, recipe_of, strategy_from
from planner.export.targets import TARGETS, refusals
from planner.export.text_files import load_yaml_object, read_arguments
from planner.foundation.errors import InputError, Problem
from planner.job.engine_settings import Engine
from planner.model.attention import CpExchange
from planner.model.sublayer import Recompute
from planner.model.workload import Optimizer, Precision
from planner.strategy.engines.recipes import every_kth, first_of_each
from planner.strategy.fixed_choices import FixedChoices
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Offload, Schedule, Strategy, Zero, offloaded, sized_stages
from tests.plans import make_plan, split, tiny_llama, tiny_mixtral

FILES = {
    "megatron": "megatron.sh",
    "deepspeed": "ds_config.json",
    "torchtitan": "job.toml",
    "accelerate": "accelerate.yaml",
}
RING, GATHER, TRADE = CpExchange.RING, CpExchange.GATHER, CpExchange.ALL_TO_ALL
Z1, Z2, Z3 = Zero.OPTIMIZER, Zero.GRADIENTS, Zero.PARAMETERS
INTER = {"schedule": Schedule.INTERLEAVED, "chunks": 2}
SP = {"sequence_parallel": True}
MOE = tiny_mixtral()
THIRD = every_kth(Degrees(), (4,), 3)
TRIPS: list[tuple[str, dict[str, Any]]] = [
    ("megatron", {"dp_replicate": 8}),
    ("megatron", {"dp_shard": 8, "zero": Z1, "micro_batch": 2}),
    ("megatron", {"dp_shard": 4, "dp_replicate": 2, "zero": Z1}),
    ("megatron", {"dp_shard": 8, "zero": Z2}),
    ("megatron", {"dp_shard": 8, "zero": Z3, "recompute": Recompute.FULL}),
    (
        "megatron",
        {"tp": 2, "pp": 2, "dp_shard": 2, "zero": Z1, "sequence_parallel": True, "stages": split(3, 1)},
    ),
    ("megatron", {"pp": 2, **INTER, "num_micro_batches": 4}),
    ("megatron", {"cp": 2, "cp_exchange": RING, "dp_shard": 4, "zero": Z1}),
    ("megatron", {"cp": 2, "cp_exchange": GATHER, "dp_shard": 2, "zero": Z1}),
    ("megatron", {"cp": 2, "cp_exchange": TRADE, "dp_shard": 2, "zero": Z1}),
    ("megatron", {"recompute": Recompute.SELECTIVE, "dp_replicate": 2}),
    ("megatron", {"pp": 2, "stages": first_of_each((2, 2), 1)}),
    ("megatron", {"dp_shard": 2, "zero": Z1, "stages": offloaded(split(4), Offload.OPTIMIZER)}),
    (
        "megatron",
        {"model": MOE, "ep": 4, "tp": 2, "etp": 1, **SP, "dp_shard": 4, "zero": Z1},
    ),
    ("megatron", {"dp_replicate": 2, "optimizer": Optimizer.SGD, "precision": Precision.FP16}),
    ("megatron", {"dp_replicate": 2, "precision": Precision.FP8}),
    ("deepspeed", {"dp_replicate": 8}),
    ("deepspeed", {"dp_shard": 8, "zero": Z1}),
    ("deepspeed", {"dp_shard": 8, "zero": Z2, "micro_batch": 2}),
    ("deepspeed", {"pp": 2, "tp": 2, "dp_shard": 2, "zero": Z1, "recompute": Recompute.FULL}),
    ("deepspeed", {"cp": 2, "cp_exchange": TRADE, "dp_shard": 4, "zero": Z3}),
    ("deepspeed", {"dp_shard": 8, "zero": Z2, "stages": offloaded(split(4), Offload.OPTIMIZER)}),
    ("deepspeed", {"model": MOE, "ep": 4, "dp_shard": 8, "zero": Z2}),
    ("deepspeed", {"dp_shard": 8, "zero": Z1, "optimizer": Optimizer.MUON, "precision": Precision.FP32}),
    ("torchtitan", {"dp_replicate": 8}),
    ("torchtitan", {"dp_shard": 8, "zero": Z3, "micro_batch": 2}),
    ("torchtitan", {"dp_shard": 4, "dp_replicate": 2, "zero": Z2, "recompute": Recompute.SELECTIVE}),
    (
        "torchtitan",
        {"tp": 2, **SP, "dp_shard": 2, "cp": 2, "cp_exchange": GATHER, "zero": Z3},
    ),
    ("torchtitan", {"pp": 2, "dp_shard": 4, "zero": Z2, "micro_batch": 2, "stages": split(3, 1)}),
    ("torchtitan", {"pp": 2, **INTER, "dp_shard": 2, "zero": Z2, "num_micro_batches": 4}),
    ("torchtitan", {"pp": 2, "chunks": 2, "schedule": Schedule.ZBV, "dp_shard": 2, "zero": Z3}),
    ("torchtitan", {"model": MOE, "ep": 4, "dp_shard": 8, "zero": Z3, "recompute": Recompute.FULL}),
    (
        "torchtitan",
        {"dp_shard": 2, "zero": Z3, "stages": THIRD, "precision": Precision.FP8},
    ),
    ("accelerate", {"dp_shard": 8, "zero": Z3, "recompute": Recompute.FULL}),
    ("accelerate", {"dp_shard": 4, "dp_replicate": 2, "zero": Z2}),
    ("accelerate", {"dp_shard": 2, "tp": 2, "cp": 2, "cp_exchange": GATHER, "zero": Z3}),
    ("accelerate", {"dp_shard": 2, "cp": 2, "cp_exchange": RING, "zero": Z3}),
    ("accelerate", {"dp_replicate": 8}),
    ("accelerate", {"dp_shard": 8, "zero": Z1, "stages": offloaded(split(4), Offload.OPTIMIZER)}),
]


def plan_of(changes: dict[str, Any]) -> Plan:
    changes = {name: value for name, value in changes.items() if value is not None}
    own = ("stages", "precision", "optimizer", "recompute")
    kept = {"precision": Precision.BF16} | {name: changes.pop(name) for name in own if name in changes}
    model = changes.pop("model", tiny_llama())
    return make_plan(model, Degrees(**{"num_micro_batches": 8, **changes}), **kept)


def gpu(plan: Plan) -> Plan:
    """The plan on a device that is no CPU: what a configuration says does not depend on which."""
    (group,) = plan.cluster.groups
    device = dataclasses.replace(group.device, name="some-gpu")
    cluster = dataclasses.replace(plan.cluster, groups=(dataclasses.replace(group, device=device),))
    return dataclasses.replace(plan, cluster=cluster)


def exported(plan: Plan, to: str, folder: Path) -> Path:
    for file in TARGETS[to].export(plan).files:
        (folder / file.name).write_text(file.text)
    return folder / FILES[to]


def read(path: Path, source: str, devices: int = 8, model: Any = None) -> tuple[Imported, list[Problem]]:
    problems: list[Problem] = []
    return read_config(path, source, model or tiny_llama(), devices, problems), problems


@pytest.mark.parametrize(("to", "changes"), TRIPS, ids=[f"{to}{n}" for n, (to, _) in enumerate(TRIPS)])
def test_an_export_comes_back_as_the_same_strategy(to: str, changes: dict[str, Any], tmp_path: Path) -> None:
    plan = gpu(plan_of(changes))
    own = {rejected.rule for rejected in refusals(plan, to)}
    assert own <= {"offload_link_known", "tp_within_node"}  # of the device, not of the engine
    path = exported(plan, to, tmp_path)
    found, problems = read(path, to, plan.cluster.devices, plan.model)
    assert problems == [] and found.not_read == ()
    settings, workload = found.settings, plan.workload
    if settings.micro_batch is None:  # Accelerate's YAML leaves it to the script
        settings = dataclasses.replace(settings, micro_batch=plan.strategy.degrees.micro_batch)
    back = strategy_from(settings, plan.model, workload.batch, plan.cluster.devices, found.engine)
    cp_exchange = (
        back.degrees.cp_exchange if plan.strategy.degrees.cp == 1 else plan.strategy.degrees.cp_exchange
    )
    degrees = dataclasses.replace(plan.strategy.degrees, cp_exchange=cp_exchange)
    if degrees.etp == degrees.tp:
        degrees = dataclasses.replace(degrees, etp=None)
    assert back == Strategy(degrees=degrees, stages=plan.strategy.stages)
    said = {field: getattr(settings, field) for field in ("seq", "batch", "precision", "optimizer")}
    assert all(value in (None, getattr(workload, field)) for field, value in said.items())
    if to in ("megatron", "torchtitan"):
        assert None not in said.values()


def test_recipes_are_told_apart() -> None:
    degrees = Degrees()
    mixes = (Recipe.FIRST, Recipe.EVERY)
    plain = Strategy(degrees=degrees, stages=sized_stages((4,), Recompute.FULL))
    assert recipe_of(plain, mixes) == (Recipe.FULL, 0)
    assert recipe_of(Strategy(degrees=degrees, stages=first_of_each((4,), 2)), mixes) == (Recipe.FIRST, 2)
    pipelined = dataclasses.replace(degrees, pp=2)
    every = Strategy(degrees=pipelined, stages=every_kth(pipelined, (5, 2), 2))
    assert recipe_of(every, mixes) == (Recipe.EVERY, 2)
    first, second = every.stages
    mixed = Strategy(degrees=pipelined, stages=(first, *sized_stages((4,), Recompute.SELECTIVE)))
    assert recipe_of(mixed, mixes) == (Recipe.MIXED, 0)
    assert second.recompute.full == 1
    one = Strategy(degrees=degrees, stages=first_of_each((4,), 1))  # both the first and every third
    assert recipe_of(one, (Recipe.FIRST,)) == (Recipe.FIRST, 1)
    assert recipe_of(one, (Recipe.EVERY,)) == (Recipe.EVERY, 3)
    assert recipe_of(one, ()) == (Recipe.MIXED, 0)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("Et*3|t*2|tL", (3, 2, 1)), ("Et|(tt|)*2tL", (1, 2, 2, 1)), ("E|t,t|t*2|L", (0, 2, 2, 0))],
)
def test_megatrons_layouts_are_read(text: str, sizes: tuple[int, ...]) -> None:
    assert layout_sizes(text) == sizes
    if 0 not in sizes:
        assert layout_sizes(layout_text(sizes)) == sizes


@pytest.mark.parametrize("text", ["Etm|tL", "(t)*999999999", "Ex|tL"])
def test_other_layouts_are_no_plans(text: str) -> None:
    with pytest.raises(ValueError):
        layout_sizes(text)


SCRIPT = """\
#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
TP=${TP:-2}   # tensor
PP=2
MODEL="--num-layers 4 --hidden-size 32 --swiglu"
ARGS=(
  --tensor-model-parallel-size $TP
  --pipeline-model-parallel-size ${PP}   # a comment with --fp16
  --seq-length 16 --micro-batch-size 1
  --global-batch-size=8 --bf16
  --cp-comm-type p2p
  --recompute-activations --use-distributed-optimizer --moe-expert-capacity-factor 1.25
    --sequence-parallel
)
if [ -n "${WANDB}" ]; then
    LOGS+=(--wandb-project ${WANDB_PROJECT:-"X"})
fi
torchrun --nproc_per_node 8 pretrain_gpt.py $MODEL --lr 1e-4 ${ARGS[@]} \\
  --optimizer sgd ${LOGS[@]}
"""


def test_a_script_of_others_is_read_with_its_variables(tmp_path: Path) -> None:
    path = tmp_path / "train.sh"
    path.write_text(SCRIPT)
    found, problems = read(path, "megatron")
    assert problems == []
    settings = found.settings
    assert (settings.tp, settings.pp, settings.sizes) == (2, 2, (2, 2))
    assert (settings.zero, settings.recompute, settings.sequence_parallel) == (Z1, Recipe.SELECTIVE, True)
    assert (settings.precision, settings.batch, settings.seq) == (Precision.BF16, 8, 16)
    assert settings.optimizer is Optimizer.SGD
    assert found.not_read[0] == "--moe-expert-capacity-factor"
    assert "--overlap-grad-reduce" in found.not_read[1]
    path.write_text(SCRIPT.replace("--cp-comm", "--overlap-grad-reduce --overlap-param-gather --cp-comm"))
    again, _ = read(path, "megatron")
    assert set(again.not_read) == {"--moe-expert-capacity-factor", "--overlap-param-gather"}


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("--num-layers-per-virtual-pipeline-stage 1", (1, 1, 1, 1)),
        ("--num-virtual-stages-per-pipeline-rank 2", (1, 1, 1, 1)),
        ("--decoder-first-pipeline-num-layers 1", (1, 3)),
        ("--decoder-last-pipeline-num-layers 1", (3, 1)),
        ("", (2, 2)),
    ],
)
def test_older_ways_to_split_layers_are_read(flags: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "args.sh"
    path.write_text(f"python x.py --pipeline-model-parallel-size 2 {flags}")
    found, problems = read(path, "megatron")
    assert (problems, found.settings.sizes) == ([], sizes)
    assert found.settings.chunks == len(sizes) // 2


FULL = "--recompute-granularity full --recompute-method"
OFFLOAD = "fsdp_config: {fsdp_offload_params: true}"
WRONG = {
    "args.sh": ("megatron", "--tensor-model-parallel-size two", "--tensor-model-parallel-size"),
    "uniform.sh": (
        "megatron",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
        "uniform",
    ),
    "model.sh": ("megatron", "--num-layers 99", "tiny-llama has 4"),
    "split.sh": ("megatron", "--pipeline-model-parallel-size 3", "do not divide"),
    "ds.json": ("deepspeed", '{"zero_optimization": {"stage": 7}}', "zero_optimization.stage"),
    "ds2.json": ("deepspeed", '{"optimizer": {"type": "OneBitAdam"}}', "AdamW"),
    "job.toml": ("torchtitan", '[activation_checkpoint]\nmode = "memory_budget"', "memory_budget"),
    "job2.toml": ("torchtitan", "[parallelism]\ntensor_parallel_degree = 0", "tensor_parallel_degree"),
    "acc.yaml": ("accelerate", "distributed_type: MEGATRON_LM", "MULTI_GPU"),
    "acc2.yaml": (
        "accelerate",
        "distributed_type: FSDP\nfsdp_config: {fsdp_offload_params: true}",
        "host memory",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_plan_has_a_word_for_is_a_problem(name: str, tmp_path: Path) -> None:
    source, text, told = WRONG[name]
    path = tmp_path / name
    path.write_text(text)
    _, problems = read(path, source)
    assert problems and told in "\n".join(map(str, problems))


@pytest.mark.parametrize(
    ("name", "source", "text"),
    [
        ("a.json", "deepspeed", "[1]"),
        ("a.yaml", "accelerate", "- 1"),
        ("b.yaml", "accelerate", "a: &x [1]\nb: *x"),
        ("c.yaml", "accelerate", "a: !!python/object/apply:os.system [ls]"),
        ("a.sh", "megatron", "echo nothing"),
        ("a.toml", "torchtitan", "= 3"),
    ],
)
def test_files_of_another_form_are_refused(name: str, source: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError):
        read(path, source)


def test_what_the_trainer_fills_in_is_not_said(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    document = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 1000,
            "sub_group_size": 5,
            "reduce_bucket_size": 5e8,
            "overlap_comm": False,
        },
    }
    path.write_text(json.dumps(document))
    found, problems = read(path, "deepspeed")
    settings = found.settings
    assert problems == []
    assert (settings.zero, settings.batch, settings.micro_batch, settings.precision) == (Z3, None, None, None)
    assert set(found.not_read) == {
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.sub_group_size",
        "zero_optimization.overlap_comm",  # which stage 3 is priced with
    }


def test_mics_of_older_releases_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "mics_shard_size": 4}}))
    found, problems = read(path, "deepspeed")
    degrees = strategy_from(found.settings, tiny_llama(), 8, 8, found.engine).degrees
    assert (problems, degrees.dp_replicate, degrees.dp_shard) == ([], 2, 4)


def test_torchtitans_own_defaults_are_what_a_job_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[parallelism]\npipeline_parallel_degree = 2\n[compile]\nenable = true\n")
    found, problems = read(path, "torchtitan")
    settings = found.settings
    assert problems == []
    assert (settings.recompute, settings.recompute_number) == (Recipe.EVERY, 2)
    assert settings.sizes == (2, 2)  # embedding and head weigh a block each
    assert (settings.zero, settings.dp_shard, settings.micro_batch, settings.batch) == (Z2, 4, 1, 32)
    assert found.not_read == ("compile.enable",)


def test_the_older_names_of_fsdp_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("distributed_type: FSDP\nfsdp_config:\n  fsdp_sharding_strategy: SHARD_GRAD_OP\n")
    found, problems = read(path, "accelerate")
    assert (problems, found.settings.zero) == ([], Z2)
    path.write_text("distributed_type: FSDP\nfsdp_config:\n  fsdp_sharding_strategy: HYBRID_SHARD\n")
    assert "HYBRID_SHARD" in str(read(path, "accelerate")[1])


def test_deepspeed_inside_accelerates_file_is_deepspeeds(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "distributed_type: DEEPSPEED\nmixed_precision: bf16\ndeepspeed_config:\n  zero_stage: 2\n"
        "  gradient_accumulation_steps: 4\n  offload_optimizer_device: cpu\n"
    )
    found, problems = read(path, "accelerate")
    settings = found.settings
    assert problems == [] and found.engine is Engine.DEEPSPEED
    assert (settings.zero, settings.num_micro_batches, settings.offload_optimizer) == (Z2, 4, True)
    assert settings.precision is Precision.BF16


def test_flags_complete_a_file_and_never_contradict_it() -> None:
    problems: list[Problem] = []
    settings = completed(
        Settings(tp=2), FixedChoices(pp=4, micro_batch=2, recompute=Recompute.FULL), problems
    )
    assert (settings.tp, settings.pp, settings.micro_batch, settings.recompute) == (2, 4, 2, Recipe.FULL)
    assert problems == []
    completed(Settings(tp=2), FixedChoices(tp=4), problems)
    assert "the file says 2" in str(problems[0])


def test_what_is_shared_out_over_one_rank_is_not_shared_out() -> None:
    settings = Settings(zero=Z3, sequence_parallel=True)
    alone = strategy_from(settings, tiny_llama(), 8, 1, Engine.MEGATRON).degrees
    assert (alone.zero, alone.sequence_parallel) == (Zero.NONE, False)
    two = strategy_from(dataclasses.replace(settings, tp=2), tiny_llama(), 8, 4, Engine.MEGATRON).degrees
    assert (two.zero, two.sequence_parallel, two.dp_shard) == (Z3, True, 2)


def test_arguments_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("ENV_VARS: {A: 1}\nMODEL_ARGS:\n  --bf16: true\n  --fp16: false\n  micro_batch_size: 2\n")
    assert read_arguments(path) == {"--bf16": True, "--micro-batch-size": 2}
    assert load_yaml_object(path)["ENV_VARS"] == {"A": 1}


PROBLEM = ["--model", "llama-3-8b", "--cluster", "2x8:h100-sxm-80gb@ndr400x8"]


def run(*words: str) -> Any:
    return CliRunner().invoke(cli, ["import", *words], prog_name="plan")


def test_the_command_estimates_and_compares(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"train_batch_size": 64, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}})
    )
    asked = run(str(path), "--from", "deepspeed", *PROBLEM)
    assert asked.exit_code == 2
    assert "--seq" in asked.stderr and "--fix micro_batch" in asked.stderr
    words = [str(path), "--from", "deepspeed", *PROBLEM, "--seq", "4096", "--fix", "micro_batch=1"]
    done = run(*words, "--json", "--time-limit", "3")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["strategy"]["zero"] == 3 and document["engine"] == "deepspeed"
    assert document["comparison"]["slower_by"] >= 0
    assert document["best"]["estimate"]["step_time_s"] <= document["estimate"]["step_time_s"]
    assert run(*words, "--batch", "32").exit_code == 2
    assert run(*words, "--engine", "megatron").exit_code == 2
    path.write_text(
        json.dumps({"train_batch_size": 64, "zero_optimization": {"stage": 3}, "pipeline": {"stages": 2}})
    )
    broken = run(*words, "--json")
    assert broken.exit_code == 3
    rules = {each["rule"] for each in json.loads(broken.stdout)["violations"]}
    assert "deepspeed_pipeline_sharding" in rules


def test_commands_offer_the_targets_that_there_are() -> None:
    """Their names are written out there, so that help loads no engine's tables."""
    assert set(TO) == set(TARGETS)
    assert set(FROM) == {name for name, target in TARGETS.items() if not target.schedules}
