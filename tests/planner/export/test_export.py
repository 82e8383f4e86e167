"""Exports: what is written, what is refused, and that scripts do what they say."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from planner.cli import cli
from planner.export import accelerate, deepspeed, megatron, torchtitan
from planner.export.artifact import MARK, Export, ExportFile, readme, write_export
from planner.export.kubernetes import MOST_BYTES
from planner.export.scheduled import run_s
from planner.export.settings import Settings
from planner.export.skypilot import accelerator
from planner.export.targets import TARGETS, refusals
from planner.foundation.errors import InputError
from planner.hardware.catalog import load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.engine_settings import Engine
from planner.model.arithmetic import RopeKind, RopeScaling
from planner.model.attention import CpExchange
from planner.model.sublayer import Recompute
from planner.model.workload import AdapterModules, Adapters, Optimizer, Precision
from planner.strategy.engines.megatron_model import ModelArguments
from planner.strategy.engines.torchtitan_model import Flavor, flavor_of
from planner.strategy.estimate import JobFigures
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees, Offload, Schedule, Zero, offloaded
from tests.plans import make_plan, split, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_mla

GPUS = "2x8:h100-sxm-80gb@ndr400x8"


def planned(engine: Engine | None = None, *, cluster: str = GPUS, model: Any = None, **changes: Any) -> Plan:
    """A plan of the tiny llama on two nodes of GPUs; `changes` are of degrees, or make_plan's own."""
    own = ("stages", "seq", "precision", "optimizer", "recompute", "adapters")
    kept = {name: changes.pop(name) for name in own if name in changes}
    kept.setdefault("precision", Precision.BF16)
    plan = make_plan(model or tiny_llama(), Degrees(**changes), **kept)
    return dataclasses.replace(plan, engine=engine, cluster=parse_cluster(cluster))


def sharded(engine: Engine | None = None, **changes: Any) -> Plan:
    return planned(engine, **{"dp_shard": 16, "zero": Zero.PARAMETERS, "num_micro_batches": 2, **changes})


def files(export: Export) -> dict[str, str]:
    return {file.name: file.text for file in export.files}


def rules(plan: Plan, to: str) -> list[str]:
    return [rejected.rule for rejected in refusals(plan, to)]


REFUSED = {
    "megatron_model": ("megatron", planned(model=load_model("gemma-2-9b"), dp_replicate=16)),
    "megatron_adapters": (
        "megatron",
        planned(adapters=Adapters(rank=2, modules=AdapterModules.ALL), dp_replicate=16),
    ),
    "megatron_experts_precision": (
        "megatron",
        planned(model=tiny_mixtral(), precision=Precision.FP16, ep=8, dp_replicate=16),
    ),
    "megatron_offload_layers": (
        "megatron",
        planned(dp_replicate=16, stages=offloaded(split(4), Offload.ACTIVATIONS)),
    ),
    "megatron_sharding": ("megatron", sharded(pp=2, dp_shard=8)),
    "deepspeed_precision": ("deepspeed", sharded(precision=Precision.FP8)),
    "deepspeed_optimizer": ("deepspeed", sharded(optimizer=Optimizer.ADAFACTOR)),
    "deepspeed_hybrid": ("deepspeed", sharded(dp_shard=8, dp_replicate=2)),
    "deepspeed_recompute": ("deepspeed", sharded(recompute=Recompute.SELECTIVE)),
    "torchtitan_model": ("torchtitan", sharded(model=tiny_gpt2())),
    "torchtitan_tied": (
        "torchtitan",
        sharded(model=tiny_llama(tied=True), pp=2, dp_shard=8, zero=Zero.GRADIENTS),
    ),
    "torchtitan_precision": ("torchtitan", planned(tp=4, pp=4, sequence_parallel=True)),
    "accelerate_pipeline": ("accelerate", sharded(pp=2, dp_shard=8)),
    "accelerate_experts": ("accelerate", sharded(model=tiny_mixtral(), ep=8)),
    "accelerate_tensor": ("accelerate", planned(tp=4, dp_replicate=4)),
    "accelerate_sequence_parallel": ("accelerate", sharded(tp=4, dp_shard=4, sequence_parallel=True)),
    "accelerate_context": ("accelerate", sharded(cp=2, dp_shard=8, cp_exchange=CpExchange.ALL_TO_ALL)),
    "accelerate_replicas": ("accelerate", sharded(zero=Zero.OPTIMIZER, dp_shard=8, dp_replicate=2)),
    "accelerate_recompute": ("accelerate", sharded(recompute=Recompute.SELECTIVE)),
    "accelerate_offload": ("accelerate", sharded(stages=offloaded(split(4), Offload.OPTIMIZER))),
    "accelerate_precision": ("accelerate", sharded(precision=Precision.FP8)),
    "accelerate_optimizer": ("accelerate", sharded(optimizer=Optimizer.MUON)),
    "accelerate_device": ("accelerate", sharded(cluster="local:16")),
    "one_kind_of_node": ("slurm", sharded(cluster="1x8:a100-sxm-80gb+1x8:h100-sxm-80gb@ndr400x8")),
    "native_model": ("kubernetes", sharded(model=load_model("bert-base-uncased"))),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_what_a_target_cannot_run_is_refused_by_name(rule: str) -> None:
    to, plan = REFUSED[rule]
    found = {rejected.rule: rejected for rejected in refusals(plan, to)}
    assert rule in found
    assert found[rule].detail and found[rule].legal


@pytest.mark.parametrize("to", ["deepspeed", "torchtitan", "accelerate", "slurm", "kubernetes", "skypilot"])
def test_what_it_can_run_is_not(to: str) -> None:
    plan = sharded(Engine.NATIVE if to in ("slurm", "kubernetes", "skypilot") else None)
    assert rules(plan, to) == []
    export = TARGETS[to].export(plan)
    note = readme(plan, export).text
    assert "SAFE" in note and plan.strategy.degrees.label() in note and export.start in note
    assert all(item.split()[0] in note for item in (*export.decides, *export.yours))


@pytest.mark.parametrize("table", [megatron.KEYS, deepspeed.KEYS, torchtitan.KEYS, accelerate.KEYS])
def test_each_key_is_once_in_its_table_and_names_a_field_and_its_source(table: Any) -> None:
    names = [key.name for key in table]
    assert len(names) == len(set(names))
    assert all(key.field in Settings.__dataclass_fields__ and key.source for key in table)


def test_megatrons_script_says_the_plan() -> None:
    changes = {"tp": 2, "pp": 2, "dp_shard": 4, "zero": Zero.OPTIMIZER, "sequence_parallel": True}
    plan = planned(Engine.MEGATRON, **changes, stages=split(3, 1), num_micro_batches=4)
    script = files(TARGETS["megatron"].export(plan))["megatron.sh"]
    for words in (
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-layout 'Et*3|tL'",
        "--use-distributed-optimizer",
        "--sequence-parallel",
        "--micro-batch-size 1",
        "--global-batch-size 16",
        "CUDA_DEVICE_MAX_CONNECTIONS=1 ",
        "--num-query-groups 4",
        "--untie-embeddings-and-output-weights",
    ):
        assert words in script, words


def test_megatron_fsdp_asks_for_more_connections_than_one() -> None:
    script = files(TARGETS["megatron"].export(sharded()))["megatron.sh"]
    assert "CUDA_DEVICE_MAX_CONNECTIONS=32" in script
    assert "--data-parallel-sharding-strategy optim_grads_params" in script
    assert "--ckpt-format fsdp_dtensor" in script


def test_a_model_is_megatrons_arguments() -> None:
    workload = planned(dp_replicate=16, seq=4096).workload
    flags = ModelArguments(load_model("deepseek-v3-671b-r1"), workload, 1)
    assert flags.faults == []
    assert flags.flags["--moe-layer-freq"] == "([0]*3+[1]*58)"
    assert (flags.flags["--kv-lora-rank"], flags.flags["--moe-router-num-groups"]) == (512, 8)
    yarn = RopeScaling(kind=RopeKind.YARN, factor=40.0, original_positions=4096)
    scale = (0.1 * math.log(40) + 1) ** 2 / math.sqrt(12)  # heads of 8 + 4; mscale_all_dim 1
    arithmetic = dataclasses.replace(tiny_mla().arithmetic, rope_scaling=yarn, attention_scale=scale)
    stretched = ModelArguments(dataclasses.replace(tiny_mla(), arithmetic=arithmetic), workload, 1)
    assert stretched.faults == [] and stretched.flags["--rope-type"] == "yarn"
    assert stretched.flags["--mscale"] == pytest.approx(1.0, abs=1e-5)
    assert stretched.flags["--mscale-all-dim"] == pytest.approx(1.0, abs=1e-5)
    windowed = ModelArguments(load_model("gemma-2-9b"), workload, 1)
    assert any("capped" in fault for fault in windowed.faults)


def test_a_shape_that_torchtitan_has_is_named_and_others_are_registered() -> None:
    known, other = flavor_of(load_model("qwen3-8b")), flavor_of(tiny_llama())
    assert isinstance(known, Flavor) and (known.flavor, known.module) == ("8B", None)
    assert known.turns == ""
    turned = flavor_of(dataclasses.replace(load_model("qwen3-8b"), rope_theta=1e4))
    assert isinstance(turned, Flavor) and "1000000" in turned.turns
    assert isinstance(other, Flavor) and other.module is not None
    assert "dim=32" in other.module and "n_kv_heads=4" in other.module
    assert flavor_of(tiny_gpt2()) != []


def test_deepspeeds_batch_is_its_micro_batches() -> None:
    document = json.loads(files(TARGETS["deepspeed"].export(sharded(micro_batch=3)))["ds_config.json"])
    assert document["train_batch_size"] == 96 == 3 * document["gradient_accumulation_steps"] * 16
    assert document["zero_optimization"]["stage"] == 3
    host = files(TARGETS["deepspeed"].export(sharded()))["hostfile"]
    assert host == "node0 slots=8\nnode1 slots=8\n"


def test_accelerate_keeps_gradients_sharded_between_micro_batches() -> None:
    made = files(TARGETS["accelerate"].export(sharded()))
    arguments = json.loads(made["training_args.json"])
    assert arguments["accelerator_config"]["gradient_accumulation_kwargs"] == {"sync_each_batch": True}
    document = yaml.safe_load(made["accelerate.yaml"])
    assert document["parallelism_config"]["parallelism_config_dp_shard_size"] == 16
    assert (document["num_machines"], document["num_processes"]) == (2, 16)


def test_a_folder_with_other_things_is_never_written_over(tmp_path: Path) -> None:
    export = TARGETS["deepspeed"].export(sharded())
    all_files = (*export.files, ExportFile(name=MARK, text="x"))
    write_export(export, all_files, tmp_path / "new")
    assert os.access(tmp_path / "new" / "deepspeed.sh", os.X_OK)
    write_export(export, all_files, tmp_path / "new")  # an earlier export of the same kind
    (tmp_path / "new" / "mine.txt").write_text("mine")
    before = sorted(path.name for path in (tmp_path / "new").iterdir())
    with pytest.raises(InputError, match=r"mine\.txt"):
        write_export(export, all_files, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == before
    with pytest.raises(InputError, match="is a file"):
        write_export(export, all_files, tmp_path / "new" / "mine.txt")


def stub(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def slurm_job(tmp_path: Path, ranks: str, engine: Engine = Engine.NATIVE) -> tuple[list[str], dict[str, str]]:
    """The batch script with stubs of Slurm in its path, and what to run it by."""
    export = TARGETS["slurm"].export(sharded(engine))
    write_export(export, (*export.files, ExportFile(name=MARK, text="x")), tmp_path / "job")
    stub(tmp_path, "srun", ranks)
    stub(
        tmp_path, "scontrol", f'if [[ "$1" == show ]]; then echo node7; else echo "$@" >> {tmp_path}/said; fi'
    )
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_SUBMIT_DIR": str(tmp_path / "job"),
    }
    return ["bash", str(tmp_path / "job" / "plan.sbatch")], environment


def ended_early(tmp_path: Path, command: list[str], environment: dict[str, str]) -> int:
    """Exit code of a job that gets SIGTERM once its ranks are up."""
    job = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    return job.wait(60)


@pytest.mark.parametrize("resumes", ["", "1"])
def test_an_engine_that_ends_badly_is_queued_again_only_where_it_resumes(
    resumes: str, tmp_path: Path
) -> None:
    ranks = f'trap "exit 1" TERM; touch {tmp_path}/up; while :; do sleep 0.05; done'
    command, environment = slurm_job(tmp_path, ranks, Engine.DEEPSPEED)
    assert ended_early(tmp_path, command, {**environment, "RESUMES": resumes}) == 1
    assert (tmp_path / "said").exists() == bool(resumes)


def test_a_slurm_job_that_is_told_to_end_saves_and_is_queued_again(tmp_path: Path) -> None:
    saved = f'trap "echo saved >> {tmp_path}/said; exit 0" TERM'
    ranks = f"{saved}; touch {tmp_path}/up; while :; do sleep 0.05; done"
    command, environment = slurm_job(tmp_path, ranks)
    assert ended_early(tmp_path, command, environment) == 0
    assert (tmp_path / "said").read_text().splitlines() == ["saved", "requeue 12"]


@pytest.mark.parametrize("code", [0, 3])
def test_a_slurm_job_that_ends_by_itself_is_not_queued_again(tmp_path: Path, code: int) -> None:
    command, environment = slurm_job(tmp_path, f"exit {code}")
    assert subprocess.run(command, env=environment, timeout=60).returncode == code
    assert not (tmp_path / "said").exists()


def test_slurm_ranks_get_their_place_and_go_on_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    command, environment = slurm_job(tmp_path, 'SLURM_PROCID=3 SLURM_LOCALID=3 SLURM_NTASKS=16 "${@:2}"')
    stub(tmp_path, "plan", f'echo "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $@" >> {tmp_path}/ran')
    (tmp_path / "job" / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    for _ in range(2):
        assert subprocess.run(command, env=environment, timeout=60).returncode == 0
        (tmp_path / "job" / "run" / "checkpoints" / "step-00000004" / "COMMIT").write_text("{}")
    first, second = (tmp_path / "ran").read_text().splitlines()
    assert first.startswith(f"3 16 3 node7 train {tmp_path}/job/plan.json --run-dir")
    assert ("--resume" in first, "--resume" in second) == (False, True)


WHO = 'echo "$@" >> {0}/ran'


@pytest.mark.parametrize(
    ("given", "rank", "address"),
    [
        ({}, "0", "127.0.0.1"),
        ({"NODE_RANK": "1", "MASTER_ADDR": "a"}, "1", "a"),
        ({"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "b"}, "1", "b"),
    ],
)
def test_a_script_takes_its_node_from_whoever_starts_it(
    given: dict[str, str], rank: str, address: str, tmp_path: Path
) -> None:
    export = TARGETS["deepspeed"].export(sharded())
    write_export(export, export.files, tmp_path / "out")
    stub(tmp_path, "torchrun", WHO.format(tmp_path))
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "TRAIN_SCRIPT": "t.py", **given}
    script = ["bash", str(tmp_path / "out" / "deepspeed.sh"), "--more"]
    assert subprocess.run(script, env=environment, timeout=60).returncode == 0
    ran = (tmp_path / "ran").read_text()
    assert f"--nnodes 2 --nproc-per-node 8 --node-rank {rank} --master-addr {address}" in ran
    assert f"t.py --deepspeed {tmp_path}/out/ds_config.json --more" in ran


def test_skypilots_nodes_are_told_their_place(tmp_path: Path) -> None:
    export = TARGETS["skypilot"].export(sharded(Engine.NATIVE))
    write_export(export, export.files, tmp_path / "out")
    stub(tmp_path, "torchrun", WHO.format(tmp_path))
    task = yaml.safe_load((tmp_path / "out" / "task.yaml").read_text())
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": "1",
        "RUN_DIR": str(tmp_path / "run"),
    }
    folder = tmp_path / "out"
    subprocess.run(["bash", "-c", task["run"]], env=environment, cwd=folder, check=True, timeout=60)
    ran = (tmp_path / "ran").read_text()
    assert "--node-rank 1 --master-addr 10.0.0.1" in ran and "--no-python plan train" in ran


def test_the_time_limit_is_the_slow_end_of_the_run_at_its_goodput() -> None:
    plan = sharded(Engine.NATIVE)
    assert run_s(plan) is None
    estimate = dataclasses.replace(plan.estimate, step_time_s=1.0, step_time_interval_s=(0.5, 2.0), days=1.0)
    assert run_s(dataclasses.replace(plan, estimate=estimate)) == 2 * 86_400 + 900
    job = JobFigures(
        data_stall_s=0,
        straggler_s=0,
        checkpoint_stall_s=0,
        checkpoint_bytes=0,
        checkpoint_wait_s=None,
        failure_share=0,
        between_failures_s=None,
        best_checkpoint_every=None,
        goodput=0.5,
        days=2.0,
        cost_usd=None,
        checkpoint_every=50,
    )
    lossy = dataclasses.replace(plan, estimate=dataclasses.replace(estimate, job=job))
    assert run_s(lossy) == 4 * 86_400 + 900
    script = files(TARGETS["slurm"].export(lossy))["plan.sbatch"]
    assert "2 at a goodput of 50.0%" in script
    assert "#SBATCH --time=4-00:15:00" in script and "--checkpoint-every 50" in script


def test_kubernetes_pods_have_the_files_shared_memory_and_time_to_save() -> None:
    made = files(TARGETS["kubernetes"].export(sharded(Engine.NATIVE)))
    config, runtime, job = yaml.safe_load_all(made["trainjob.yaml"])
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
    pod = node["template"]["spec"]["template"]["spec"]
    assert set(config["data"]) == {"plan.json", "native.sh"}
    assert pod["terminationGracePeriodSeconds"] > 300
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(volumes) == {"plan", "shm", "run-dir"}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory"}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["shm"] == "/dev/shm" and pod["containers"][0]["command"][1].startswith(mounts["plan"])
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": 8}
    assert job["spec"]["trainer"]["numNodes"] == 2
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]


def test_files_that_no_configmap_holds_are_refused() -> None:
    plan = sharded(Engine.NATIVE)
    large = dataclasses.replace(plan, schedule_table=(("0F0" * MOST_BYTES,),))
    with pytest.raises(InputError, match="ConfigMap"):
        TARGETS["kubernetes"].export(large)


def test_skypilot_asks_for_the_instance_or_for_accelerators() -> None:
    rented = files(TARGETS["skypilot"].export(sharded(Engine.NATIVE, cluster="2*aws/p5.48xlarge")))
    task = yaml.safe_load(rented["task.yaml"])
    assert task["resources"] == {"infra": "aws", "instance_type": "p5.48xlarge"}
    assert task["num_nodes"] == 2
    named = files(TARGETS["skypilot"].export(sharded(Engine.NATIVE)))
    assert yaml.safe_load(named["task.yaml"])["resources"] == {"accelerators": "H100:8"}
    assert accelerator("a100-sxm-80gb") == "A100-80GB"
    with pytest.raises(InputError, match="no name for"):
        accelerator("made-up")


def test_schedulers_start_the_plans_engine() -> None:
    plan = sharded(Engine.DEEPSPEED)
    made = files(TARGETS["slurm"].export(plan))
    assert {"plan.sbatch", "ds_config.json", "deepspeed.sh"} <= set(made)
    assert "deepspeed.sh" in made["plan.sbatch"] and "plan train" not in made["plan.sbatch"]
    assert "#SBATCH --ntasks-per-node=1" in made["plan.sbatch"]


ESTIMATE = ["estimate", "--model", "llama-3-8b", "--cluster", GPUS, "--seq", "4096", "--batch", "64"]


def run(*words: str) -> Any:
    return CliRunner().invoke(cli, list(words), prog_name="plan")


def test_the_command_writes_prints_and_refuses(tmp_path: Path) -> None:
    plan = str(tmp_path / "plan.json")
    assert run(*ESTIMATE, "--fix", "zero=3", "--fix", "pp=1", "-o", plan).exit_code == 0
    printed = run("export", plan, "--to", "torchtitan")
    assert printed.exit_code == 0 and "==> job.toml <==" in printed.stdout
    written = run("export", plan, "--to", "torchtitan", "-o", str(tmp_path / "out"), "--json")
    document = json.loads(written.stdout)
    names = {file["name"] for file in document["files"]}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    assert run(*ESTIMATE, "--fix", "zero=1", "--fix", "pp=2", "-o", plan).exit_code == 0
    refused = run("export", plan, "--to", "torchtitan", "--json")
    assert refused.exit_code == 3
    assert json.loads(refused.stdout)["violations"][0]["rule"] == "torchtitan_sharding"
    told = run("export", plan, "--to", "torchtitan", "-o", str(tmp_path / "none"))
    assert told.exit_code == 3 and "plan solve --engine torchtitan" in told.stderr
    assert not (tmp_path / "none").exists()
    mixed = ["--cluster", "1x8:a100-sxm-80gb+1x8:h100-sxm-80gb@ndr400x8", "--fix", "zero=3", "--fix", "pp=1"]
    assert run(*ESTIMATE, *mixed, "-o", plan).exit_code == 0
    told = run("export", plan, "--to", "slurm")  # which no search knows of
    assert "one_kind_of_node" in told.stderr and "plan solve" not in told.stderr
    assert run("export", str(tmp_path / "no.json"), "--to", "slurm").exit_code == 2


@pytest.mark.parametrize(
    ("schedule", "chunks", "name"),
    [
        (Schedule.GPIPE, 1, "GPipe"),
        (Schedule.ONE_F_ONE_B, 1, "1F1B"),
        (Schedule.INTERLEAVED, 2, "Interleaved1F1B"),
        (Schedule.DUALPIPEV, 2, "DualPipeV"),
    ],
)
def test_schedules_are_named_as_torch_names_them(schedule: Schedule, chunks: int, name: str) -> None:
    plan = sharded(pp=2, dp_shard=8, chunks=chunks, schedule=schedule, num_micro_batches=8)
    text = files(TARGETS["torchtitan"].export(plan))["job.toml"]
    assert f'pipeline_parallel_schedule = "{name}"' in text


def test_a_v_of_stages_is_a_job_of_torchtitan() -> None:
    changes = {"pp": 2, "chunks": 2, "schedule": Schedule.ZBV, "dp_shard": 8, "zero": Zero.GRADIENTS}
    plan = planned(Engine.TORCHTITAN, **changes, num_micro_batches=8)
    text = files(TARGETS["torchtitan"].export(plan))["job.toml"]
    assert 'pipeline_parallel_schedule = "ZBVZeroBubble"' in text
    assert 'fsdp_reshard_after_forward = "never"' in text
    assert "local_batch_size = 8" in text and "global_batch_size = 64" in text
