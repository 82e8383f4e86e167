"""`--from-run` with W&B's own file: one that wandb 0.31 wrote; others made here, whole, cut off, hostile."""

from __future__ import annotations

import json
import random
import shutil
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from planner.calibration.runs import read_runs
from planner.calibration.wandb_file import BLOCK, HEADER, read_wandb_file
from planner.cli import cli
from planner.foundation.errors import InputError

WRITTEN = Path(__file__).parents[2] / "data" / "wandb" / "run-k3v9.wandb"
"""Of 14 steps and 2 evaluations, by wandb 0.31.0 offline, machine and console left out."""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["calibrate", *map(str, arguments)])


def varint(value: int) -> bytes:
    rest = value >> 7
    return bytes([value & 0x7F | (0x80 if rest else 0)]) + (varint(rest) if rest else b"")


def field(number: int, value: bytes | int | float | str) -> bytes:
    """A field of a message in the wire format of protobuf."""
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def item(path: str, value: object) -> bytes:
    """An item of a history or an update of a configuration, as W&B writes them."""
    keys = path.split(".")
    names = b"".join(field(2, key) for key in keys) if len(keys) > 1 else field(1, path)
    return field(1, names + field(16, json.dumps(value)))


def history(**figures: object) -> bytes:
    return field(2, b"".join(item(name, value) for name, value in figures.items()))


def config(**settings: object) -> bytes:
    return field(5, b"".join(item(name, value) for name, value in settings.items()))


def logged(records: Iterable[bytes]) -> bytes:
    """A file of some records, in pieces where a block ends."""
    found = bytearray(HEADER)
    for record in records:
        rest, first = record, True
        while first or rest:
            left = BLOCK - len(found) % BLOCK
            if left < 7:
                found += bytes(left)
                continue
            piece, rest = rest[: left - 7], rest[left - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            found += (
                struct.pack("<IHB", zlib.crc32(piece, zlib.crc32(bytes([kind]))), len(piece), kind) + piece
            )
            first = False
    return bytes(found)


def write(folder: Path, records: Iterable[bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "run-abc.wandb"
    path.write_bytes(logged(records))
    return path


def test_a_file_that_wandb_wrote_becomes_a_row(tmp_path: Path) -> None:
    """The median of its steps after warm-up; settings, of which lists and nothing are left out."""
    found = read_wandb_file(WRITTEN)
    assert len(found.steps) == 16 and not found.cut_off
    assert [step["perf.step_time"] for step in found.steps if "perf.step_time" in step][2:4] == [9.0, 2.53]
    assert found.settings["trainer.num_nodes"] == "2" and found.settings["gradient_checkpointing"] == "true"
    assert not {"betas", "notes"} & set(found.settings)
    folder, table = tmp_path / "offline-run-1", tmp_path / "r.csv"
    (folder / "files").mkdir(parents=True)
    shutil.copy(WRITTEN, folder)
    sizes = ["--set", "device=h100-sxm-80gb", "--set", "gpus_per_node=8"]
    for named in (folder, folder / "files", folder / WRITTEN.name):
        result = call("--from-run", named, *sizes, "-o", table)
        assert result.exit_code == 0, result.output
        (run,) = read_runs([table]).runs
        assert run.step_time_s == pytest.approx(2.58) and run.peak_reserved_gib == 61.5
        assert (run.model, run.nodes, run.tp, run.micro_batch) == ("llama-3-8b", 2, 4, 2)
        assert (run.precision, run.recompute, run.seq_len) == ("bf16", "full", 4096)
        assert "the last step alone" not in run.notes


def test_values_of_every_kind_and_the_machine(tmp_path: Path) -> None:
    """Older files have values that are no JSON; later settings win; integers are zigzag."""
    typed = [(4, 1, True), (5, 7, -4), (6, 2.5, 2.5), (7, "a", "a"), (8, "[1]", [1]), (16, "null", None)]
    items = b"".join(field(1, field(1, f"v{number}") + field(number, raw)) for number, raw, _ in typed)
    machine = field(26, field(18, "NVIDIA H100 80GB HBM3") + field(19, 8) + field(5, "--flag"))
    run = field(17, field(1, "id") + field(4, item("tp", 2) + item("_wandb", {"t": 1})))
    path = write(tmp_path / "run", [run, machine, config(tp=4, a={"b": False, "c": [1]}), field(2, items)])
    found = read_wandb_file(path)
    assert found.steps == [{f"v{number}": value for number, _, value in typed}]
    machine_of = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_count": "8"}
    assert found.settings == {**machine_of, "tp": "4", "a.b": "false"}


@pytest.mark.parametrize("seed", range(4))
def test_records_of_any_length_lie_across_blocks(tmp_path: Path, seed: int) -> None:
    """Also those that end within 7 bytes of a block's end, and those over several blocks."""
    draw = random.Random(seed)
    sizes = [
        draw.choice([0, 1, draw.randrange(9000), BLOCK - draw.randrange(40), 3 * BLOCK]) for _ in range(60)
    ]
    path = write(tmp_path / "run", [history(n=n, text="x" * size) for n, size in enumerate(sizes)])
    assert [(step["n"], len(step["text"])) for step in read_wandb_file(path).steps] == list(enumerate(sizes))


def test_what_a_killed_run_did_not_finish_is_left_out(tmp_path: Path) -> None:
    """Wherever the file ends, and where a bit of its last record is not what was written."""
    records = [config(seq_length=4096), *(history(step_time=1.0 + n, text="x" * 3000) for n in range(20))]
    whole = logged(records)
    path = write(tmp_path / "run", records)
    ends = [len(logged(records[: n + 1])) for n in range(len(records))]
    for end in (ends[0] + 3, ends[5] - 1, ends[9], ends[12] + 8, BLOCK + 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        found = read_wandb_file(path)
        assert len(found.steps) == sum(end >= each for each in ends) - 1
        assert found.cut_off == (end not in ends)
    path.write_bytes(whole[:-9] + b"?" + whole[-8:])
    assert len(read_wandb_file(path).steps) == 19
    result = call("--from-run", path.parent, "-o", tmp_path / "r.csv")
    assert "run-abc.wandb: cut off or damaged behind its first 19 steps" in result.output


def test_a_trainer_that_logs_no_rate_is_timed_by_the_trackers_clock(tmp_path: Path) -> None:
    """Ten steps an entry of a quarter of a second each; evaluations between them do not count."""
    now, records = 1_000.0, []
    for entry in range(1, 13):
        now += 10 * (0.25 if entry > 2 else 2.0)
        records.append(history(**{"train/loss": 2.0, "train/global_step": 10 * entry, "_timestamp": now}))
        now += 7.0
        records.append(history(**{"eval/loss": 2.0, "train/global_step": 10 * entry, "_timestamp": now}))
    table = tmp_path / "r.csv"
    result = call("--from-run", write(tmp_path / "run", records), "-o", table)
    assert result.exit_code == 0 and "from the tracker's clock" in result.output, result.output
    assert read_runs([table]).runs[0].step_time_s == pytest.approx(0.25)


HOSTILE = {
    "no file of W&B": b"PAR1" + bytes(100),
    "the header alone": HEADER,
    "a value that is cut off": logged([b"\x12\x7f\x01"]),
    "an integer without an end": logged([b"\xff" * 40]),
    "a group": logged([b"\x13"]),
    "an integer in place of a message": logged([field(2, 7)]),
    "no text": logged([field(2, field(1, field(1, b"\xff\xfe") + field(16, "1")))]),
    "no JSON": logged([field(2, field(1, field(1, "a") + field(16, "{")))]),
    "deep JSON": logged([field(2, field(1, field(1, "a") + field(16, "[" * 200_000)))]),
    "a short number": logged([field(2, field(1, field(1, "a") + field(6, b"123")))]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run-x.wandb"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(InputError, match=str(path)):
        read_wandb_file(path)
    result = call("--from-run", path, "-o", tmp_path / "r.csv")
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_folders_without_a_step_or_with_several_runs_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "run", [config(tp=2)])
    assert "holds no step" in call("--from-run", tmp_path / "run", "-o", tmp_path / "r.csv").output
    shutil.copy(WRITTEN, tmp_path / "run")
    text = call("--from-run", tmp_path / "run", "-o", tmp_path / "r.csv").output
    assert "holds 2 runs: run-abc.wandb, run-k3v9.wandb" in text and "name its file" in text
