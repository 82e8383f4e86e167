"""Readings that outlive the process that took them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

pytest.importorskip("torch")

from planner.foundation.errors import InputError
from planner.model.workload import Precision
from planner.profile.merge import Platform
from planner.profile.profile import CommSample, Constant, Op
from runtime.profiler import scheduler as record_module
from runtime.profiler.profile_cases import Reading
from runtime.profiler.scheduler import RECORD_SCHEMA, Header, Record, open_record

PLATFORM = Platform(
    device="cpu", device_title="A CPU", backend="gloo", torch="2.13.0", precision=Precision.FP32
)
HEADER = Header(record_schema=RECORD_SCHEMA, stack=PLATFORM, quick=False, models={"m": "sha256:abc"})
COMM = CommSample(op=Op.ALL_REDUCE, ranks=2, groups=1, bytes=4096, seconds=1e-3, spread=0.1, samples=3)
RATE = Constant(name="gemm_flops", value=1e11, origin="measured")
MEASURED = Reading(samples=(COMM, RATE))
SKIPPED = Reading(skipped="not enough memory")


def opened(path: Path, header: Header = HEADER, *, replace: bool = False) -> Record:
    return open_record(path, header, replace=replace)


def written(path: Path) -> None:
    record = opened(path)
    record.add("comms", "all_reduce", MEASURED)
    record.add("layers", "head", SKIPPED)
    record.close()


def test_readings_come_back(tmp_path: Path) -> None:
    path = tmp_path / "p.partial"
    written(path)
    again = opened(path)
    assert again.readings == {"comms": {"all_reduce": MEASURED}, "layers": {"head": SKIPPED}}
    assert again.kept == 2 and again.measured() == ["comms: all_reduce"]
    again.add("layers", "block", MEASURED)
    again.close()
    assert opened(path).kept == 3


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_cut_off_costs_itself(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "p.partial"
    written(path)
    os.truncate(path, path.stat().st_size - cut)
    record = opened(path)
    assert record.readings == {"comms": {"all_reduce": MEASURED}}
    record.add("layers", "head", SKIPPED)
    record.close()
    assert opened(path).readings["layers"] == {"head": SKIPPED}


def test_an_empty_record_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "p.partial"
    opened(path).close()
    assert not path.exists()


def test_a_cut_header_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "p.partial"
    path.write_text('{"record_schema": 1, "sta')
    written(path)
    assert opened(path).kept == 2


def test_another_platform_or_model_of_that_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.partial"
    written(path)
    other = dataclasses.replace(
        HEADER,
        stack=dataclasses.replace(PLATFORM, torch="2.12.1"),
        quick=True,
        models={"m": "sha256:def", "n": "sha256:123"},
    )
    with pytest.raises(InputError) as error:
        opened(path, other)
    text = str(error.value)
    assert "torch 2.13.0 against 2.12.1" in text and "--replace" in text
    assert "not --quick against --quick" in text and "model m" in text and "model n" not in text
    assert opened(path, other, replace=True).kept == 0


def test_other_models_go_on_and_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "p.partial"
    written(path)
    other = dataclasses.replace(HEADER, models={"n": "sha256:123"})
    record = opened(path, other)
    assert record.kept == 2
    record.close()
    with pytest.raises(InputError, match="model n"):
        opened(path, dataclasses.replace(HEADER, models={"n": "sha256:456"}))


def test_two_do_not_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "LOCK_PAUSE_S", 0.0)
    path = tmp_path / "p.partial"
    record = opened(path)
    with pytest.raises(InputError, match="another plan profile"):
        opened(path)
    record.add("comms", "all_reduce", MEASURED)
    record.close()
    assert opened(path).kept == 1


@pytest.mark.parametrize(
    "text", ["nothing\n", "[]\n", '{"record_schema": 1}\n', '{"family": "x", "case": "y"}\n', "\x00\n"]
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.partial"
    path.write_text(text)
    with pytest.raises(InputError):
        opened(path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "line", ['{"family": 1}', "[1]", '{"family":"f","case":"c","skipped":"","samples":[["x",{}]]}', "{"]
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.partial"
    written(path)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match="line 4"):
        opened(path)
