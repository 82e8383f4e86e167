"""What a device-hour computes and costs: peak, assumed utilisation, and the cheapest known price."""

from __future__ import annotations

from planner.foundation.decode import load_toml
from planner.foundation.frozen import frozen
from planner.foundation.units import GIB, MIB
from planner.hardware.catalog import data_folder
from planner.hardware.device_file import DeviceFile
from planner.hardware.instance import Instance
from planner.hardware.prices import Market

PRECISIONS = ("bf16", "fp16", "fp32", "fp8")
"""Formats of matrix products that a peak can be asked for."""


@frozen
class MfuRun:
    """A published run: the share of the dense peak that its model FLOPs used."""

    model: str
    family: str
    devices: str
    low: float
    high: float
    sources: tuple[str, ...]


@frozen
class PublishedMfu:
    """The default utilisation with its reason, and the runs that say what range is honest."""

    default: float
    why: str
    runs: tuple[MfuRun, ...]

    def range_of(self, device: str) -> tuple[float, float, tuple[MfuRun, ...]]:
        """Lowest and highest of the runs on devices of this family, or of all runs where there is none."""
        own = tuple(run for run in self.runs if device.startswith(run.family))
        runs = own or self.runs
        return min(run.low for run in runs), max(run.high for run in runs), runs


@frozen
class Price:
    """Dollars for an hour of one device, and where that was read."""

    usd_per_device_hour: float
    source: str


@frozen
class DeviceRate:
    """A device in one precision: its dense peak (None: unknown), assumed MFU, memory and price.

    `mfu_low` and `mfu_high` are the range of published runs, `mfu_source` their names.
    """

    name: str
    title: str
    precision: str
    peak_flops: float | None
    known_peaks: tuple[str, ...]
    memory_bytes: int
    usable_memory_bytes: int
    mfu: float
    mfu_low: float
    mfu_high: float
    mfu_source: str
    price: Price | None
    sources: tuple[str, ...]

    @property
    def flops_per_s(self) -> float | None:
        """FLOP/s that training reaches by the assumed utilisation."""
        return None if self.peak_flops is None else self.peak_flops * self.mfu

    @property
    def costed_precision(self) -> str:
        """The format that the cost model is asked in: it knows no fp8, and needs a known peak."""
        if self.precision == "fp32":
            return "fp32"
        known = [name for name in (self.precision, "bf16", "fp16") if self._knows(name)]
        return next((name for name in known if name != "fp8"), "bf16")

    def _knows(self, precision: str) -> bool:
        return any(text.startswith(f"{precision} ") for text in self.known_peaks)

    @property
    def unknown_peak(self) -> str:
        """Why there is no time: the peak that is missing, and those that are known."""
        known = ", ".join(self.known_peaks) or "none"
        return f"the {self.precision} peak of {self.title} is unknown or unsupported (known: {known})"


def published_mfu() -> PublishedMfu:
    """The utilisation of published runs."""
    return load_toml(data_folder() / "published_mfu.toml", PublishedMfu)


def default_precision(device: DeviceFile) -> str:
    """bf16; fp16 where only that peak is known."""
    peaks = device.peak_tflops
    return "fp16" if peaks.bf16 is None and peaks.fp16 is not None else "bf16"


MARKS = ("yours", "READ")
"""Marks of prices, best first: the user's own, then those read in a source, then all others."""


def _trust(offer: Instance) -> int:
    mark = offer.price_mark
    return next((rank for rank, start in enumerate(MARKS) if mark.startswith(start)), len(MARKS))


def price_of(device: DeviceFile, market: Market) -> Price | None:
    """A device-hour: the user's price or the cost on premises, else the cheapest on-demand offer.

    Offers are those of the most trusted mark: the user's own, read in a source, recalled.
    """
    own = market.device_price(device)
    if own is not None:
        return Price(usd_per_device_hour=own.usd_per_hour, source=own.text())
    priced = [
        (_trust(offer), usd, offer)
        for offer in market.instances
        if offer.device == device.name and (usd := offer.usd_per_device_hour) is not None and usd > 0
    ]
    if not priced:
        return None
    trust, usd, offer = min(priced, key=lambda item: item[:2])
    same = [each for rank, each, _ in priced if rank == trust]
    source = (
        f"cheapest of {len(same)} on-demand offers ({min(same):.2f} to {max(same):.2f}): {offer.full_name}, "
        f"{offer.price_mark or 'no mark'}, {offer.as_of or 'no date'}"
    )
    return Price(usd_per_device_hour=usd, source=source)


def device_rate(
    device: DeviceFile, precision: str | None, mfu: float | None, price: Price | None
) -> DeviceRate:
    """The rate of a device; without a format and an MFU, its usual format and the default MFU."""
    published = published_mfu()
    low, high, runs = published.range_of(device.name)
    chosen = precision or default_precision(device)
    tflops = {name: getattr(device.peak_tflops, name) for name in PRECISIONS}
    return DeviceRate(
        name=device.name,
        title=device.title,
        precision=chosen,
        peak_flops=None if tflops[chosen] is None else tflops[chosen] * 1e12,
        known_peaks=tuple(f"{name} {value:g} TFLOP/s" for name, value in tflops.items() if value is not None),
        memory_bytes=device.memory.reported_mib * MIB,
        usable_memory_bytes=round(device.memory.usable_gib * GIB),
        mfu=published.default if mfu is None else mfu,
        mfu_low=low,
        mfu_high=high,
        mfu_source="; ".join(f"{run.model} on {run.devices} {run.family}" for run in runs),
        price=price,
        sources=device.peak_tflops.sources,
    )
