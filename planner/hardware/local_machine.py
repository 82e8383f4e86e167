"""This machine as a cluster: its accelerators, or processes on its CPU. Torch is not asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from planner.foundation.errors import InputError, Problem
from planner.foundation.units import MIB
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
