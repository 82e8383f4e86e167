"""Bad input of `plan train` is refused before anything is started; a full disk loses nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.cli import cli
from planner.foundation.errors import InputError
from planner.profile.choose import ProfileUse
from planner.strategy.plan import load_plan, save_plan
from planner.strategy.strategy import Degrees
from runtime.checkpoint.store import committed_folders
from runtime.train.data.documents import shipped_corpus
from runtime.train.data.prepare import DataOptions
from runtime.train.options import TrainOptions
from runtime.train.session import check_same_devices, foreign_cpu, foreign_torch
from runtime.train.train import run_training
from tests.plans import make_plan, tiny_llama

MODEL = tiny_llama(vocab=258)
PP2 = make_plan(MODEL, Degrees(pp=2, micro_batch=1, num_micro_batches=4))
ONE = make_plan(MODEL, Degrees(micro_batch=2))

Edit = Callable[[dict[str, Any]], object]


def _set(path: str, value: Any) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        *above, last = path.split(".")
        place: Any = document
        for key in above:
            place = place[int(key) if key.isdigit() else key]
        place[int(last) if last.isdigit() else last] = value

    return edit


EDITS: dict[str, tuple[Edit, str]] = {
    "more ranks than devices": (_set("strategy.tp", 2), "2"),
    "a degree of zero": (_set("strategy.tp", 0), "below 1: tp0"),
    "a negative degree": (_set("strategy.pp", -2), "below 1: tp1 pp-2"),
    "a tensor degree that splits no heads": (_set("strategy.tp", 3), "3"),
    "another number of stages": (_set("strategy.chunks", 2), "chunks|stages|schedule"),
    "another micro-batch": (_set("strategy.micro_batch", 3), "batch"),
    "another number of micro-batches": (_set("strategy.num_micro_batches", 2), "batch|actions"),
    "sharding without shards": (_set("strategy.zero", 3), "zero"),
    "a ZeRO stage that is none": (_set("strategy.zero", 7), "zero"),
    "a schedule that is none": (_set("strategy.schedule", "2f2b"), "schedule"),
    "another schedule than its table": (_set("strategy.schedule", "interleaved"), "schedule|chunks"),
    "experts in a dense model": (_set("strategy.ep", 2), "ep|expert"),
    "a sequence that does not split": (_set("strategy.cp", 3), "cp|ranks|devices"),
    "layers left out": (_set("stages.1.layers", [3, 4]), "layer"),
    "layers twice": (_set("stages.1.layers", [1, 4]), "layer"),
    "layers beyond the model": (_set("stages.1.layers", [2, 9]), "layer"),
    "more recomputed than there are": (_set("stages.0.recompute.full", 9), "recompute|layers"),
    "a negative count": (_set("stages.0.recompute.none", -1), "recompute|none"),
    "a stage missing": (lambda d: d["stages"].pop(), "stages"),
    "an action missing": (lambda d: d["schedule_table"][0].pop(), "schedule"),
    "an action twice": (lambda d: d["schedule_table"][0].append("0F0"), "schedule"),
    "backward before forward": (lambda d: d["schedule_table"][1].reverse(), "schedule"),
    "an action of another rank's stage": (_set("schedule_table.0.0", "1F0"), "schedule"),
    "an action that is none": (_set("schedule_table.0.0", "0X0"), "0X0"),
    "a row missing": (lambda d: d["schedule_table"].pop(), "schedule"),
    "another grid": (_set("ranks.shape.0", 4), "grid|ranks"),
    "another order of axes": (lambda d: d["ranks"]["axes"].reverse(), "axes"),
    "another batch": (_set("workload.batch", 5), "batch"),
    "a batch of zero": (_set("workload.batch", 0), "batch"),
    "a precision that is none": (_set("workload.precision", "fp7"), "precision"),
    "other devices in number": (_set("cluster.groups.0.devices_per_node", 3), "devices"),
    "an unknown key": (_set("strategy.tpp", 1), "tpp"),
    "a number as text": (_set("workload.seq", "16"), "seq"),
    "NaN": (_set("estimate.step_time_s", float("nan")), "step_time_s|NaN|finite"),
}  # fmt: skip


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    save_plan(PP2, path)
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize("name", EDITS)
def test_a_plan_edited_into_illegality_is_refused(
    name: str, document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, named = EDITS[name]
    edited = copy.deepcopy(document)
    edit(edited)
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    arguments = [str(tmp_path / "plan.json"), "--steps", "1", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert all(line.startswith("error: ") for line in said.splitlines()), said
    assert any(word in said for word in named.split("|")), said
    assert not (tmp_path / "run").exists()


def test_the_unedited_plan_is_sound(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(document))
    assert load_plan(tmp_path / "plan.json") == PP2


def test_a_plan_larger_than_this_machine_or_for_another_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = PP2.stage_estimates[0]
    memory = dataclasses.replace(stage.memory, weights_bytes=2**60)
    large = dataclasses.replace(PP2, stage_estimates=(dataclasses.replace(stage, memory=memory), stage))
    with pytest.raises(
        InputError, match=r"predicted to hold 1\.\d+ EiB|predicted to hold .* together.*--any-device"
    ):
        check_same_devices(large, "cpu")
    group = PP2.cluster.groups[0]
    gpu = dataclasses.replace(group, device=dataclasses.replace(group.device, name="h100-sxm-80gb"))
    plan = dataclasses.replace(PP2, cluster=dataclasses.replace(PP2.cluster, groups=(gpu,)))
    monkeypatch.setattr("runtime.train.session.accelerators", lambda: [("NVIDIA A100-SXM4-80GB", 81920)])
    with pytest.raises(InputError, match="the plan is for h100-sxm-80gb; this machine has a100-sxm-80gb"):
        check_same_devices(plan, "cuda")
    monkeypatch.setattr("runtime.train.session.accelerators", lambda: [("NVIDIA H100 80GB HBM3", 81559)])
    check_same_devices(plan, "cuda")
    assert "times will differ" in (foreign_cpu(PP2) or "")


def test_a_profile_of_another_release_of_torch_is_remarked_on() -> None:
    use = ProfileUse(device="cpu", name="x", devices=("cpu",), measured=True, created="2026-11-24")
    assert foreign_torch(PP2) is None and foreign_torch(dataclasses.replace(PP2, profiles=(use,))) is None
    same = dataclasses.replace(use, torch=torch.__version__.partition("+")[0] + "+cu130")
    assert foreign_torch(dataclasses.replace(PP2, profiles=(same,))) is None
    other = dataclasses.replace(use, torch="1.0.0")
    told = foreign_torch(dataclasses.replace(PP2, profiles=(other,))) or ""
    assert "taken with torch 1.0.0" in told and torch.__version__ in told


# ------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Limits the size of files that this process and its children may write, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def _options(run_dir: Path, cache: Path, steps: int, **given: Any) -> TrainOptions:
    data = DataOptions(data=(str(shipped_corpus()),), tokenizer="byte")
    return TrainOptions(steps=steps, run_dir=str(run_dir), data=data, data_cache=str(cache), **given)


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path, small_files: Callable[[int], None]) -> None:
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    run_training(ONE, _options(run_dir, cache, 2), shown=False)
    before = committed_folders(run_dir / "checkpoints")
    lines = (run_dir / "metrics.jsonl").read_text()
    small_files(len(lines) + 600)
    with pytest.raises(InputError, match=r"cannot be written: .*[Ff]ile (too )?large"):
        run_training(ONE, _options(run_dir, cache, 9, resume=True), shown=False)
    small_files(resource.RLIM_INFINITY)
    assert committed_folders(run_dir / "checkpoints") == before
    assert (run_dir / "metrics.jsonl").read_text().startswith(lines)
    summary = run_training(ONE, _options(run_dir, cache, 4, resume=True), shown=False)
    assert summary is not None
    assert (summary.first_step, summary.last_step) == (3, 4)
    small_files(40_000)
    with pytest.raises(InputError, match=r"checkpoints/step-00000006.*(cannot be written|[Ff]ile too large)"):
        run_training(ONE, _options(run_dir, cache, 6, resume=True), shown=False)
    small_files(resource.RLIM_INFINITY)
    assert committed_folders(run_dir / "checkpoints")[0].name == "step-00000004"
    assert not list((run_dir / "checkpoints").glob("*.tmp"))
