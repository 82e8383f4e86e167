"""`plan profile`: what it refuses, keeps, adds to, and how several ranks take one together."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from torch.distributed import HashStore

from planner.commands.running.profile import profile as profile_command
from planner.commands.running.profile_progress import ProfileProgress
from planner.foundation.errors import InputError
from planner.model.workload import Precision
from planner.profile.merge import NO_TIME, key_of
from planner.profile.profile import Constant, Op, load_profile
from runtime.profiler.joint_world import END, JointWorld, World
from runtime.profiler.scheduler import Scheduler


def write_config(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(
        '{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, '
        '"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "rms_norm_eps": 1e-05, '
        '"max_position_embeddings": 64, "rope_theta": 10000.0, "hidden_act": "silu", '
        '"initializer_range": 0.02, "tie_word_embeddings": false}'
    )
    return path


@pytest.fixture
def arguments(tmp_path: Path) -> Iterator[list[str]]:
    yield ["--model", str(write_config(tmp_path)), "--seq", "16", "-o", str(tmp_path / "profile.json")]


FEW = ["--quick", "--tp", "1", "--max-message", "64KiB", "--sweeps", "none"]
SMALL = [*FEW, "--micro-batch", "1"]
"""Few cases: what is tested is what becomes of them."""

COMMAND = [sys.executable, "-c", "from planner.cli import main; main()", "profile"]


def end_when_measuring(arguments: list[str], ending: signal.Signals) -> tuple[int, str]:
    """Starts a profile of two ranks and ends it when the first samples are there; its exit code, and what it
    said after. SIGKILL goes to the command alone, others to all of its processes, none of which is left."""
    command = [*COMMAND, *arguments, "--cluster", "local:2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline()]
        while not lines[-1].startswith("measuring"):
            assert lines[-1], lines
            lines.append(process.stderr.readline())
        if ending is signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, ending)
        rest = process.stderr.read()
        code = process.wait(timeout=30)
    if ending is not signal.SIGKILL:  # orphans that were killed are in the hands of the system
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    return code, rest


@pytest.mark.parametrize(
    ("ending", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_an_interrupted_profile_goes_on(
    arguments: list[str], tmp_path: Path, ending: signal.Signals, code: int
) -> None:
    """What was measured is kept, is not measured again, and nothing half is written."""
    run = [*arguments, *SMALL]
    found, said = end_when_measuring(run, ending)
    assert found == code and "Traceback" not in said
    partial = tmp_path / "profile.json.partial"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", partial.name}
    kept = [json.loads(line) for line in partial.read_text().splitlines()[1:]]
    assert kept
    if ending is not signal.SIGKILL:
        assert f"interrupted: {len(kept)} cases are kept in {partial}: the same command goes on" in said
    result = subprocess.run(
        [*COMMAND, *run, "--cluster", "local:2"], capture_output=True, text=True, check=True
    )
    assert f"going on from the {len(kept)} cases" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "profile.json"}
    profile = load_profile(tmp_path / "profile.json")
    first = [Constant(**data) for line in kept for name, data in line["samples"] if name == "constants"]
    assert first and set(first) <= set(profile.constants)
    assert {c.active for c in profile.contention} == {1, 2} and profile.layers and profile.comms


def test_another_profile_is_added_to_the_first(arguments: list[str], tmp_path: Path) -> None:
    """New cases beside old ones; another precision is refused, unless the file is to be replaced."""
    path = tmp_path / "profile.json"
    run = [*arguments, *FEW, "--cluster", "local:1"]
    assert CliRunner().invoke(profile_command, [*run, "--micro-batch", "1"]).exit_code == 0
    first = load_profile(path)
    again = [*run, "--micro-batch", "4"]
    assert CliRunner().invoke(profile_command, again).exit_code == 0
    both = load_profile(path)
    assert {s.micro_batch for s in both.layers} == {1, 4}
    assert set(first.layers) < set(both.layers)
    assert all(sample.taken for sample in both.layers)
    assert len(both.constants) == len(first.constants)
    refused = CliRunner().invoke(profile_command, [*run, "--precision", "bf16"])
    assert isinstance(refused.exception, InputError)
    assert "precision fp32 against bf16" in str(refused.exception) and "--replace" in str(refused.exception)
    assert load_profile(path) == both
    half = [*run, "--micro-batch", "1", "--precision", "bf16", "--replace"]
    replaced = CliRunner().invoke(profile_command, half)
    assert replaced.exit_code == 0
    assert {s.precision for s in load_profile(path).layers} == {Precision.BF16}


def test_a_file_that_is_no_profile_is_not_overwritten(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"a": 1}')
    result = CliRunner().invoke(profile_command, arguments)
    assert isinstance(result.exception, InputError)
    assert "no profile to add to: schema_version is missing" in str(result.exception)
    assert path.read_text() == '{"a": 1}'


def test_without_torch_the_command_says_how_to_get_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(profile_command, arguments)
    assert isinstance(result.exception, InputError)
    assert "pip install 'shardwise[runtime]'" in str(result.exception)
    assert not (tmp_path / "profile.json").exists()


def test_bad_input_is_told_before_measuring(arguments: list[str], tmp_path: Path) -> None:
    arguments[-1] = str(tmp_path / "missing" / "profile.json")
    result = CliRunner().invoke(profile_command, [*arguments, "--cluster", "1x8:h100-sxm-80gb"])
    assert isinstance(result.exception, InputError)
    assert [problem.where for problem in result.exception.problems] == ["--cluster", "-o"]


def test_a_message_that_is_no_size_names_its_flag(arguments: list[str]) -> None:
    result = CliRunner().invoke(profile_command, [*arguments, "--max-message", "3XB"])
    assert isinstance(result.exception, InputError)
    assert [problem.where for problem in result.exception.problems] == ["--max-message"]


def test_the_standard_set_is_told_only_where_it_is_measured(tmp_path: Path) -> None:
    output = str(tmp_path / "profile.json")
    result = CliRunner().invoke(profile_command, ["--cluster", "1x8:h100-sxm-80gb", "-o", output])
    assert isinstance(result.exception, InputError)
    assert "no model is named" not in result.stderr


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_narrow_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with ProfileProgress() as progress:
        progress.ahead(157, 31.0)
        progress.step("block tp2+sp micro-batch 2 of 128 tokens recompute selective, in bf16")
    assert "1/158" in terminal.getvalue()
    assert "at most 31 s left" in terminal.getvalue()


def test_a_width_that_does_not_divide_is_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(profile_command, [*arguments, "--tp", "2", "--tp", "3"])
    assert isinstance(result.exception, InputError)
    (problem,) = result.exception.problems
    assert (problem.where, problem.legal) == ("--tp", "1, 2, 4")


def test_shards_that_no_layer_has_are_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(profile_command, [*arguments, "--cp", "3", "--cp", "2", "--ep", "2"])
    assert isinstance(result.exception, InputError)
    sequences, experts = result.exception.problems
    assert (sequences.where, sequences.legal) == ("--cp", "1, 2, 4, 8")
    assert "3 ranks" in sequences.fault
    assert (experts.where, experts.legal) == ("--ep", "1")


def test_shares_of_a_sequence_are_measured(arguments: list[str], tmp_path: Path) -> None:
    run = [*arguments, *SMALL, "--cluster", "local:1", "--cp", "2"]
    assert CliRunner().invoke(profile_command, run, catch_exceptions=False).exit_code == 0
    samples = load_profile(tmp_path / "profile.json").layers
    assert {s.cp for s in samples} == {1, 2}


def test_a_device_that_is_not_there(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = CliRunner().invoke(profile_command, [*arguments, "--device", "cuda"])
    assert isinstance(result.exception, InputError)
    (problem,) = result.exception.problems
    assert problem.where == "--device" and "CUDA_VISIBLE_DEVICES hides all" in problem.fault


def test_little_time_leaves_the_rest_and_says_so(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile is written of what there is; the same command with more time takes the rest, and no more."""
    run = [*arguments, *SMALL, "--cluster", "local:1"]
    with monkeypatch.context() as short:
        short.setattr(Scheduler, "over", lambda self: sum(course.timed for course in self.courses) >= 3)
        result = CliRunner().invoke(profile_command, run, catch_exceptions=False)
    assert result.exit_code == 0
    first = load_profile(tmp_path / "profile.json")
    assert any(text.endswith(NO_TIME) for text in first.skipped)
    partial = tmp_path / "profile.json.partial"
    assert f"time was up: 3 cases are kept in {partial}" in result.stderr
    more = CliRunner().invoke(profile_command, run, catch_exceptions=False)
    assert more.exit_code == 0 and not partial.exists()
    assert "going on from the 3 cases" in more.stderr
    second = load_profile(tmp_path / "profile.json")
    assert first.constants and set(first.constants) < set(second.constants)
    assert not any(text.endswith(NO_TIME) for text in second.skipped)


def test_a_profile_of_nothing_is_not_written(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(profile_command, [*arguments, *SMALL, "--time-limit", "0.000001"])
    assert isinstance(result.exception, InputError)
    (problem,) = result.exception.problems
    assert problem.where == "--time-limit"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def start_ranks(command: list[str], nodes: int, per_node: int) -> list[tuple[int, str, str]]:
    """Runs a command as every rank of some nodes, all on this machine; exit code, stdout, stderr of each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = []
    for rank in range(nodes * per_node):
        place = {"RANK": rank, "LOCAL_RANK": rank % per_node, "GROUP_RANK": rank // per_node}
        sizes = {"WORLD_SIZE": nodes * per_node, "LOCAL_WORLD_SIZE": per_node, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in (place | sizes).items()}
        ranks.append(
            subprocess.Popen(
                command,
                env=os.environ | environment | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=200) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(ranks, said, strict=True)]


def test_ranks_of_a_launcher_measure_together(arguments: list[str], tmp_path: Path) -> None:
    """Two nodes of two ranks: groups inside a node and over both; only the first rank writes and talks."""
    run = [*COMMAND, *arguments, *SMALL]
    ranks = start_ranks(run, 2, 2)
    assert [code for code, _, _ in ranks] == [0, 0, 0, 0], ranks
    assert [bool(out) for _, out, _ in ranks] == [True, False, False, False]
    assert all(error == "" for _, _, error in ranks[1:])
    profile = load_profile(tmp_path / "profile.json")
    shapes = {(s.ranks, s.groups, s.stride, s.nodes) for s in profile.comms}
    assert shapes == {(2, 1, 1, 1), (2, 2, 2, 2), (4, 1, 1, 2)}
    assert {s.op for s in profile.comms if s.nodes == 2} == set(Op)
    assert profile.devices_per_node == 2 and profile.skipped == ()
    assert len(profile.comms) == len({key_of(sample) for sample in profile.comms})


def test_a_cluster_of_another_size_than_was_started_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank says so before anybody measures."""
    joint = JointWorld(0, 0, World(ranks=4, per_node=2), ("", 0), HashStore())
    monkeypatch.setattr("planner.commands.running.profile.join_ranks", lambda: joint)
    result = CliRunner().invoke(profile_command, [*arguments, "--cluster", "local:3"])
    assert isinstance(result.exception, InputError)
    (problem,) = result.exception.problems
    assert (problem.where, problem.legal) == ("--cluster", "local, local:2")
    assert JointWorld(1, 1, joint.world, ("", 0), joint._store).await_round() == (1, END), "nobody waits"


def test_a_device_that_others_use_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found is named, and the flag that measures all the same, which torch may not be able to."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        """#!/bin/sh
case "$*" in
*name,memory.total*) echo "NVIDIA H100 80GB HBM3, 81559" ;;
*memory.used*) echo "0, 40960, 97" ;;
*compute-apps*) echo "123, python train.py, 40000" ;;
*) exit 1 ;;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    refused = CliRunner().invoke(profile_command, arguments)
    assert isinstance(refused.exception, InputError)
    in_use = refused.exception.problems[-1]
    assert in_use.where == "--cluster local" and "--anyway" in in_use.fix
    assert "40.0 GiB in use and is 97% busy" in in_use.fault and "process 123" in in_use.fault
    if torch.version.cuda is None:
        allowed = CliRunner().invoke(profile_command, [*arguments, "--anyway"])
        assert isinstance(allowed.exception, InputError)
        (problem,) = allowed.exception.problems
        assert "built without CUDA" in problem.fault and "--device cpu" in problem.fix
    assert not (tmp_path / "profile.json").exists()
