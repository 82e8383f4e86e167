"""This machine as a cluster: its accelerators, or processes on its CPU. Torch is not asked.

What the driver says of the accelerators: who uses them, and how fast they run. Nothing is ever set.

All is asked of nvidia-smi, which does not make a context on the device as torch would.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.units import GIB, MIB
from planner.hardware.catalog import device_reported_as
from planner.hardware.cluster import ClusterSpec, Device, DeviceGroup, Link

MAX_LOCAL = 256
"""More processes than this on one CPU are taken for a typing error."""

USABLE_SHARE = 0.9
"""Share of the RAM that processes get; the rest is left to the system and its caches."""

QUERY_TIMEOUT_S = 20.0
SHARED_MEMORY_BYTES_PER_S = 1.0e9
SHARED_MEMORY_LATENCY_S = 2.0e-4
"""Gloo between processes of one CPU: an all-reduce of 4 KiB over 2 processes took 1.3 ms and of 16 MiB
20 ms (measured on two cores, torch 2.13); a profile replaces both."""

PCIE4_BYTES_PER_S = 31.5e9
"""Taken for the link of an accelerator that the catalog does not know (PCIe4 x16, MLE)."""


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores()
    return max(1, min(cores, int(quota)) if quota is not None else cores)


def physical_memory_bytes() -> int:
    """RAM that this process may use: the machine's, or less where its control group is limited."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    limits = [int(text) for file in files if (text := _first_word(file)).isdigit()]
    return min([total, *limits])


def _cgroup_cores() -> float | None:
    """Cores that the control group's quota allows (version 2, then 1), or None without a quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()[:2]
    except (OSError, ValueError):
        quota = _first_word("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _first_word("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period) > 0 and int(quota) > 0:
        return int(quota) / int(period)
    return None


def _first_word(file: str) -> str:
    try:
        return Path(file).read_text(encoding="ascii").split()[0]
    except (OSError, ValueError, IndexError):
        return ""


def cpu_title() -> str:
    """The processor's name as the system shows it, or `CPU`."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "CPU"
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else "CPU"


def query_driver(query: str, devices: Sequence[str] = ()) -> list[list[str]] | None:
    """Rows of a query, of some devices or of all; None where nvidia-smi is not there or does not know."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, query, "--format=csv,noheader,nounits"]
    command += ["-i", ",".join(devices)] if devices else []
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=QUERY_TIMEOUT_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]


def accelerators() -> list[tuple[str, int]]:
    """Name and memory in MiB of each NVIDIA accelerator that programs may use, as the driver reports it.

    Honours CUDA_VISIBLE_DEVICES: an empty value or -1 hides all of them.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return []
    found = []
    for *name, memory in query_driver("--query-gpu=name,memory.total") or []:
        if any(name) and memory.isdigit():
            found.append((",".join(name), int(memory)))
    return found if visible is None else _visible(found, visible.split(","))


def _visible(found: list[tuple[str, int]], chosen: list[str]) -> list[tuple[str, int]]:
    """Those that CUDA_VISIBLE_DEVICES chooses: by number up to the first wrong one, or as many as named."""
    if not all(name.strip().isdigit() for name in chosen):
        return found[: len(chosen)]
    picked = []
    for number in (int(name) for name in chosen):
        if number >= len(found):
            break
        picked.append(found[number])
    return picked


def local_cluster(count: int | None) -> ClusterSpec:
    """This machine with `count` devices; all accelerators, or a process a core, where count is None."""
    found = accelerators()
    if found:
        return _accelerator_cluster(found, count)
    processes = usable_cores() if count is None else count
    if not 1 <= processes <= MAX_LOCAL:
        raise _fault(f"{processes} processes on this CPU.", f"1 to {MAX_LOCAL}")
    device = cpu_device(processes)
    link = Link(
        name="shared memory",
        latency_s=SHARED_MEMORY_LATENCY_S,
        bytes_per_s=SHARED_MEMORY_BYTES_PER_S,
        sources=device.sources,
    )
    group = DeviceGroup(device=device, nodes=1, devices_per_node=processes, slots_per_node=usable_cores())
    return ClusterSpec(name=f"local:{processes}", groups=(group,), intra=link, inter=link)


def cpu_device(processes: int) -> Device:
    """One of `processes` equal processes on this CPU; peaks are unknown, and a profile measures them."""
    memory_bytes = physical_memory_bytes() // processes
    return Device(
        name="cpu",
        title=cpu_title(),
        vendor="",
        memory_bytes=memory_bytes,
        usable_memory_bytes=int(memory_bytes * USABLE_SHARE),
        memory_bandwidth_bytes_per_s=None,
        peak_fp32_flops=None,
        peak_bf16_flops=None,
        peak_fp16_flops=None,
        link_bytes_per_s=SHARED_MEMORY_BYTES_PER_S,
        link="shared memory",
        sources=("this machine: RAM divided by the processes; link: rough figure of gloo between processes",),
    )


def _accelerator_cluster(found: list[tuple[str, int]], count: int | None) -> ClusterSpec:
    wanted = len(found) if count is None else count
    if not 1 <= wanted <= len(found):
        raise _fault(
            f"{wanted} devices, and this machine has {len(found)} accelerators.",
            f"1 to {len(found)}",
            "set CUDA_VISIBLE_DEVICES to nothing for processes on the CPU",
        )
    names = sorted({name for name, _ in found[:wanted]})
    if len(names) > 1:
        raise _fault(f"the accelerators differ: {', '.join(names)}.", "equal ones, by CUDA_VISIBLE_DEVICES")
    device, link = _accelerator(*found[0], wanted)
    group = DeviceGroup(device=device, nodes=1, devices_per_node=wanted)
    return ClusterSpec(name=f"local:{wanted}", groups=(group,), intra=link, inter=link)


def _accelerator(name: str, memory_mib: int, count: int) -> tuple[Device, Link]:
    """The catalog's device of that name; otherwise one of which only the memory is known."""
    known = device_reported_as(name)
    if known is not None:
        return known.device(), known.link_of(count)
    source = "this machine's driver; the catalog does not know this device, so its peaks are unknown"
    device = Device(
        name="-".join(name.lower().split()),
        title=name,
        vendor="NVIDIA",
        memory_bytes=memory_mib * MIB,
        usable_memory_bytes=max(1, memory_mib - 768) * MIB,
        memory_bandwidth_bytes_per_s=None,
        peak_fp32_flops=None,
        peak_bf16_flops=None,
        peak_fp16_flops=None,
        link_bytes_per_s=PCIE4_BYTES_PER_S,
        link="PCIe4 (assumed)",
        sources=(source,),
    )
    link = Link(name=device.link, latency_s=2e-6, bytes_per_s=PCIE4_BYTES_PER_S, sources=("assumed",))
    return device, link


def _fault(fault: str, legal: str, fix: str = "") -> InputError:
    return InputError(Problem(where="--cluster local", fault=fault, legal=legal, fix=fix))


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
