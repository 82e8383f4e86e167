"""What the driver says of the accelerators: who uses them, and how fast they run. Nothing is ever set.

All is asked of nvidia-smi, which does not make a context on the device as torch would.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from planner.foundation.frozen import frozen
from planner.foundation.units import GIB, MIB
from planner.hardware.local_machine import query_driver


@frozen
class Clocks:
    """How an accelerator ran while it was measured, sampled in between; its settings were left alone.

    Medians, the lowest clock and the highest temperature of the samples in which it was at work. `throttled`
    is the share of them in which the driver held clocks back, by its reason.
    """

    sm_hz: float
    sm_lowest_hz: float
    memory_hz: float
    power_w: float
    temperature_c: float
    throttled: dict[str, float]
    samples: int


BUSY_BYTES = GIB
"""More memory in use than this is somebody's: a driver alone holds some hundred MiB."""

BUSY_SHARE = 0.05
"""A device that worked for more than this share of the last second is at work."""

SAMPLED = "utilization.gpu,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"
SAMPLE_MS = 500
IDLE = 0x1
THROTTLES = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
}
"""Bits of nvmlClocksEventReasons (NVML API reference): why clocks are below what they could be."""


def chosen_devices(count: int) -> list[str]:
    """What nvidia-smi calls the first `count` devices that programs may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(n) for n in range(count)]
    return names[:count]


def why_none() -> str:
    """Why no accelerator is seen, where none is."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all of them"
    if shutil.which("nvidia-smi") is None:
        return "the driver's nvidia-smi is not installed"
    return "nvidia-smi names none"


def others_at_work(count: int) -> list[str] | None:
    """What else uses the first `count` devices, a text each; None where that cannot be known."""
    devices = chosen_devices(count)
    states = query_driver("--query-gpu=index,memory.used,utilization.gpu", devices)
    if states is None:
        return None
    found = []
    for index, used_mib, busy_percent in (row[:3] for row in states if len(row) >= 3):
        used_bytes, busy = (_number(used_mib) or 0.0) * MIB, (_number(busy_percent) or 0.0) / 100
        if used_bytes > BUSY_BYTES or busy > BUSY_SHARE:
            found.append(f"device {index} has {used_bytes / GIB:.1f} GiB in use and is {busy:.0%} busy")
    programs = query_driver("--query-compute-apps=pid,process_name,used_memory", devices) or []
    found += [f"process {row[0]} ({row[1][-60:]}) computes" for row in programs if len(row) >= 2]
    return found


def driver_version() -> str | None:
    """The driver's version, such as 580.65.06; None where nvidia-smi does not say."""
    rows = query_driver("--query-gpu=driver_version", chosen_devices(1))
    return rows[0][0] if rows else None


def _number(text: str) -> float | None:
    """A figure of nvidia-smi, or None for `[N/A]` and the like."""
    try:
        return float(text)
    except ValueError:
        return None


class ClockWatch:
    """Samples clocks, power and temperature of some devices within `with`; `clocks` sums them up.

    A process of its own samples into a pipe, without a thread here; it ends with this process, as soon as
    nobody reads. Call `read` now and then, or the pipe is full and samples are lost.
    """

    def __init__(self, count: int) -> None:
        self._devices = chosen_devices(count)
        self._process: subprocess.Popen[bytes] | None = None
        self._text = b""

    def __enter__(self) -> ClockWatch:
        program = shutil.which("nvidia-smi")
        if program is not None and self._devices:
            command = [program, f"--query-gpu={SAMPLED}", "--format=csv,noheader,nounits"]
            command += [f"--loop-ms={SAMPLE_MS}", "-i", ",".join(self._devices)]
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
            )
            assert self._process.stdout is not None
            os.set_blocking(self._process.stdout.fileno(), False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.read()
            self._process.kill()
            self._process.communicate()
            self._process = None

    def read(self) -> None:
        """Takes what has been sampled."""
        if self._process is not None and self._process.stdout is not None:
            while chunk := self._process.stdout.read(1 << 16):
                self._text += chunk

    def clocks(self) -> Clocks | None:
        """Medians over the samples in which a device was at work; None without any."""
        rows = [line.split(",") for line in self._text.decode(errors="replace").splitlines()]
        working = [row for row in map(_sample, rows) if row is not None]
        if not working:
            return None
        sm_mhz, memory_mhz, power_w, temperature_c = ([row[column] for row in working] for column in range(4))
        reasons = Counter(name for row in working for bit, name in THROTTLES.items() if int(row[4]) & bit)
        return Clocks(
            sm_hz=statistics.median(sm_mhz) * 1e6,
            sm_lowest_hz=min(sm_mhz) * 1e6,
            memory_hz=statistics.median(memory_mhz) * 1e6,
            power_w=statistics.median(power_w),
            temperature_c=max(temperature_c),
            throttled={name: count / len(working) for name, count in sorted(reasons.items())},
            samples=len(working),
        )


def _sample(row: Sequence[str]) -> tuple[float, float, float, float, int] | None:
    """Clocks (MHz), power (W), temperature and reasons of a line; None where the device idled."""
    if len(row) != 6:
        return None
    busy, *figures = (_number(cell.strip()) for cell in row[:5])
    try:
        reasons = int(row[5].strip(), 16)
    except ValueError:
        reasons = 0
    if not busy or reasons & IDLE or any(figure is None for figure in figures):
        return None
    sm_mhz, memory_mhz, power_w, temperature_c = (figure or 0.0 for figure in figures)
    return sm_mhz, memory_mhz, power_w, temperature_c, reasons
