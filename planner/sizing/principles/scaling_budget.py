"""A training budget in FLOPs, device-hours or dollars, and what FLOPs take of a device."""

from __future__ import annotations

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.sizing.principles.device_rate import DeviceRate
from planner.sizing.principles.scaling import LEAST_BUDGET_FLOPS, MOST_BUDGET_FLOPS


@frozen
class Budget:
    """FLOPs to spend, how they were derived, and the device that spends them where one is named."""

    flops: float
    formula: str
    rate: DeviceRate | None

    def device_hours(self, flops: float) -> float | None:
        """Device-hours of `flops` at the assumed utilisation; None without a device or its peak."""
        speed = None if self.rate is None else self.rate.flops_per_s
        return None if speed is None else flops / speed / 3600

    def usd(self, flops: float) -> float | None:
        """Dollars of `flops`; None where the hours or the price are unknown."""
        hours = self.device_hours(flops)
        price = None if self.rate is None else self.rate.price
        return None if hours is None or price is None else hours * price.usd_per_device_hour


def budget_of_flops(flops: float, rate: DeviceRate | None) -> Budget:
    """A budget given in FLOPs. Raises InputError outside the range in which the laws mean anything."""
    return _checked("--budget-flops", float(flops), "C as given", rate)


def budget_of_hours(hours: float, rate: DeviceRate) -> Budget:
    """C = device-hours x 3600 x peak x MFU. Raises InputError where the peak is unknown."""
    flops = hours * 3600 * _speed("--budget-gpu-hours", rate)
    formula = f"{hours:,.0f} h x 3600 x {rate.peak_flops:.4g} x MFU {rate.mfu:g}"
    return _checked("--budget-gpu-hours", flops, formula, rate)


def budget_of_usd(usd: float, rate: DeviceRate) -> Budget:
    """C = dollars / price x 3600 x peak x MFU. Raises InputError where peak or price are unknown."""
    if rate.price is None:
        raise InputError(
            Problem(
                where="--budget-usd",
                fault=f"no on-demand price of {rate.title} is known.",
                fix="say it with --usd-per-gpu-hour",
            )
        )
    each = rate.price.usd_per_device_hour
    flops = usd / each * 3600 * _speed("--budget-usd", rate)
    formula = f"${usd:,.0f} / ${each:.4g} an hour x 3600 x {rate.peak_flops:.4g} x MFU {rate.mfu:g}"
    return _checked("--budget-usd", flops, formula, rate)


def _speed(flag: str, rate: DeviceRate) -> float:
    if rate.flops_per_s is None:
        raise InputError(
            Problem(where=flag, fault=f"{rate.unknown_peak}.", fix="choose a known format with --precision")
        )
    return rate.flops_per_s


def _checked(flag: str, flops: float, formula: str, rate: DeviceRate | None) -> Budget:
    if not LEAST_BUDGET_FLOPS <= flops <= MOST_BUDGET_FLOPS:
        raise InputError(
            Problem(
                where=flag,
                fault=f"is {flops:.3g} FLOPs, where the laws say nothing.",
                legal=f"{LEAST_BUDGET_FLOPS:g} to {MOST_BUDGET_FLOPS:g} FLOPs",
            )
        )
    return Budget(flops=flops, formula=formula, rate=rate)
