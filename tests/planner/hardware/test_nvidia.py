"""What is asked of the driver, with a program in its place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from planner.hardware import local_machine as nvidia
from planner.hardware.local_machine import (
    ClockWatch,
    chosen_devices,
    driver_version,
    others_at_work,
    why_none,
)

HEAD = """#!/bin/sh
case "$*" in
"""
TAIL = """*) exit 1 ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def answer(folder: Path, cases: str) -> None:
    """Puts a program in nvidia-smi's place."""
    program = folder / "nvidia-smi"
    program.write_text(HEAD + cases + TAIL)
    program.chmod(0o755)


def idle_or_busy(used_mib: str, busy: str, programs: str = "") -> str:
    return f"""*memory.used*"-i 0,1") echo "0, 12, 0"; echo "1, {used_mib}, {busy}" ;;
*compute-apps*) printf '{programs}' ;;
"""


def test_an_idle_device_is_free(folder: Path) -> None:
    answer(folder, idle_or_busy("600", "2"))
    assert others_at_work(2) == []


@pytest.mark.parametrize(
    ("used_mib", "busy", "programs", "said"),
    [
        ("20480", "0", "", "device 1 has 20.0 GiB in use and is 0% busy"),
        ("600", "97", "", "device 1 has 0.6 GiB in use and is 97% busy"),
        ("600", "0", "123, python train.py, 512\\n", "process 123 (python train.py) computes"),
        ("[N/A]", "[N/A]", "7, x, [N/A]\\n", "process 7 (x) computes"),
    ],
)
def test_a_device_in_use_is_named(folder: Path, used_mib: str, busy: str, programs: str, said: str) -> None:
    answer(folder, idle_or_busy(used_mib, busy, programs))
    assert others_at_work(2) == [said]


def test_the_driver(folder: Path) -> None:
    assert driver_version() is None
    answer(folder, "*driver_version*) echo 580.65.06 ;;\n")
    assert driver_version() == "580.65.06"


def test_no_answer_is_no_verdict(folder: Path) -> None:
    assert others_at_work(1) is None and "not installed" in why_none()
    answer(folder, "")
    assert others_at_work(1) is None and "names none" in why_none()


def test_devices_by_their_visible_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert chosen_devices(3) == ["0", "1", "2"] and chosen_devices(0) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-ab")
    assert chosen_devices(1) == ["3"] and chosen_devices(2) == ["3", "GPU-ab"]


LINES = """97, 1500, 2619, 650.5, 61, 0x0000000000000004
0, 345, 2619, 70.0, 40, 0x0000000000000001
99, 1400, 2619, 690.0, 66, 0x0000000000000024
98, 1700, 2619, 610.0, 60, 0x0000000000000000
[N/A], 1, 1, 1, 1, 0x0
half a li"""


def test_clocks_are_of_the_samples_at_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "SAMPLE_MS", 10)
    answer(folder, f"*throttle*) cat <<'END'\n{LINES}\nEND\nexec sleep 60 ;;\n")
    with ClockWatch(1) as watch:
        process = watch._process
        deadline = time.monotonic() + 30
        while watch.clocks() is None or watch.clocks().samples < 3:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            watch.read()
    clocks = watch.clocks()
    assert clocks is not None and clocks.samples == 3
    assert (clocks.sm_hz, clocks.sm_lowest_hz, clocks.memory_hz) == (1.5e9, 1.4e9, 2.619e9)
    assert (clocks.power_w, clocks.temperature_c) == (650.5, 66)
    assert clocks.throttled == {"power cap": pytest.approx(2 / 3), "software thermal": pytest.approx(1 / 3)}
    assert process is not None and process.returncode is not None, "the sampling process is ended"


def test_without_a_driver_there_are_no_clocks(folder: Path) -> None:
    with ClockWatch(1) as watch:
        watch.read()
    assert watch.clocks() is None
