"""The file that describes a device: hand-written TOML in GiB, TFLOPS and GB/s, a source for each group."""

from __future__ import annotations

from pathlib import Path

from planner.foundation.decode import load_toml
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.units import GIB, MIB
from planner.hardware.cluster import Device, Link
from planner.hardware.network import share_origin

PCIE_SHARE = 0.39
PCIE_SHARE_SOURCE = (
    "share: AIC: all-reduce of 512 MiB over 8 RTX PRO 6000 Server on PCIe5, 24.7 of 63 GB/s; for all PCIe"
)
"""Part of the nominal PCIe rate that large collectives of a whole host reach, and where that was read."""


@frozen
class MemoryFacts:
    """Device memory. `reported_mib` is what the driver shows, `usable_gib` what a program can allocate."""

    nominal_gb: float
    reported_mib: int
    usable_gib: float
    bandwidth_gb_per_s: float
    sources: tuple[str, ...]
    type: str = ""
    unverified: tuple[str, ...] = ()


@frozen
class PeakFacts:
    """Dense peaks in TFLOPS by format; a format that is absent is unknown or unsupported."""

    sources: tuple[str, ...]
    fp32: float | None = None
    tf32: float | None = None
    bf16: float | None = None
    fp16: float | None = None
    fp8: float | None = None
    fp4: float | None = None
    unverified: tuple[str, ...] = ()


@frozen
class MeasuredFacts:
    """What large matrix products were measured to reach."""

    bf16_gemm_tflops: float
    sources: tuple[str, ...]


@frozen
class LinkFacts:
    """The link between devices of a node. `domain` devices are joined by it; None: all of the host.

    `share` is the part of the nominal rate that collectives of large messages reach, where no curve of this
    kind of device is shipped.
    """

    name: str
    gb_per_s: float
    latency_us: float
    sources: tuple[str, ...]
    domain: int | None = None
    share: float | None = None
    unverified: tuple[str, ...] = ()


@frozen
class PcieFacts:
    """The link to the host, which also joins devices beyond the domain of the link above."""

    generation: int
    gb_per_s: float
    sources: tuple[str, ...]


@frozen
class PowerFacts:
    """Thermal design power of one device."""

    tdp_w: float
    sources: tuple[str, ...]
    unverified: tuple[str, ...] = ()


@frozen
class PriceFacts:
    """Purchase price of one device in dollars, as of a date."""

    as_of: str
    sources: tuple[str, ...]
    low_usd: float | None = None
    typical_usd: float | None = None
    high_usd: float | None = None
    unverified: tuple[str, ...] = ()


@frozen
class DeviceFile:
    """Everything that the catalog knows of a device. `unverified` names keys that no source was read for."""

    name: str
    title: str
    vendor: str
    memory: MemoryFacts
    peak_tflops: PeakFacts
    link: LinkFacts
    network: str
    architecture: str = ""
    compute_capability: str = ""
    form_factor: str = ""
    year: int | None = None
    aliases: tuple[str, ...] = ()
    reported_names: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    measured: MeasuredFacts | None = None
    pcie: PcieFacts | None = None
    power: PowerFacts | None = None
    price: PriceFacts | None = None

    def device(self) -> Device:
        """The planner's view of the device, in SI units."""
        return Device(
            name=self.name,
            title=self.title,
            vendor=self.vendor,
            memory_bytes=self.memory.reported_mib * MIB,
            usable_memory_bytes=round(self.memory.usable_gib * GIB),
            memory_bandwidth_bytes_per_s=self.memory.bandwidth_gb_per_s * 1e9,
            peak_fp32_flops=_flops(self.peak_tflops.fp32),
            peak_bf16_flops=_flops(self.peak_tflops.bf16),
            peak_fp16_flops=_flops(self.peak_tflops.fp16),
            peak_fp8_flops=_flops(self.peak_tflops.fp8),
            link_bytes_per_s=self.link.gb_per_s * 1e9,
            link=self.link.name,
            host_link_bytes_per_s=self.pcie.gb_per_s * 1e9 if self.pcie else None,
            sources=tuple(dict.fromkeys((*self.memory.sources, *self.peak_tflops.sources))),
        )

    def link_of(self, devices: int) -> Link:
        """The link that joins `devices` of a node: PCIe where they are more than the fast link joins."""
        if self.link.domain is not None and devices > self.link.domain and self.pcie is not None:
            return Link(
                name=f"PCIe{self.pcie.generation}",
                latency_s=self.link.latency_us / 1e6,
                bytes_per_s=self.pcie.gb_per_s * 1e9,
                sources=(
                    *self.pcie.sources,
                    f"{self.link.name} joins only {self.link.domain} devices",
                    PCIE_SHARE_SOURCE,
                ),
                share=PCIE_SHARE,
                share_origin="fitted",
            )
        return Link(
            name=self.link.name,
            latency_s=self.link.latency_us / 1e6,
            bytes_per_s=self.link.gb_per_s * 1e9,
            sources=self.link.sources,
            share=self.link.share,
            share_origin=share_origin(self.link.share, self.link.unverified),
        )


def _flops(tflops: float | None) -> float | None:
    return None if tflops is None else tflops * 1e12


def load_device_file(path: Path) -> DeviceFile:
    """The device that a TOML file describes. Raises InputError with every fault, also of the numbers."""
    facts = load_toml(path, DeviceFile)
    numbers = {
        "memory.nominal_gb": facts.memory.nominal_gb,
        "memory.reported_mib": facts.memory.reported_mib,
        "memory.usable_gib": facts.memory.usable_gib,
        "memory.bandwidth_gb_per_s": facts.memory.bandwidth_gb_per_s,
        "link.gb_per_s": facts.link.gb_per_s,
        "link.latency_us": facts.link.latency_us,
        "link.domain": facts.link.domain,
        "link.share": facts.link.share,
        "power.tdp_w": facts.power and facts.power.tdp_w,
        "pcie.gb_per_s": facts.pcie and facts.pcie.gb_per_s,
        **{
            f"price.{name}": facts.price and getattr(facts.price, name)
            for name in ("low_usd", "typical_usd", "high_usd")
        },
        **{
            f"peak_tflops.{name}": getattr(facts.peak_tflops, name)
            for name in ("fp32", "tf32", "bf16", "fp16", "fp8", "fp4")
        },
    }
    problems = [
        Problem(where=f"{path}: {key}", fault=f"is {value}.", legal="numbers above 0 and below 1e9")
        for key, value in numbers.items()
        if value is not None and not 0 < value < 1e9
    ]
    if facts.link.share is not None and facts.link.share > 1:
        problems.append(
            Problem(where=f"{path}: link.share", fault=f"is {facts.link.share}.", legal="above 0, at most 1")
        )
    if facts.memory.usable_gib * GIB > facts.memory.reported_mib * MIB:
        problems.append(
            Problem(
                where=f"{path}: memory.usable_gib",
                fault=f"is {facts.memory.usable_gib}, above reported_mib {facts.memory.reported_mib}.",
            )
        )
    if problems:
        raise InputError(*problems)
    return facts
