"""What a whole run usually suffers, for questions in which "not said" must not mean "free".

Failures at the rate of the device, checkpoints behind the steps at the interval that loses least, storage
that grows with the cluster, a restart of detection and loading; at a spot price, preemptions. What is not
filled in costs nothing and is listed as not modelled: evaluation, ramp-up, slow loaders, slow devices. Each
figure has its source in profiles/failures.toml.
"""

from __future__ import annotations

import dataclasses

from planner.foundation.units import format_seconds
from planner.hardware.cluster import Device
from planner.hardware.failures import failure_file
from planner.job.problem import BEST, NO_OVERHEADS, JobOverheads
from planner.sizing.comparison import Assumption


def usual_overheads(devices: int, said: JobOverheads = NO_OVERHEADS, *, spot: bool = False) -> JobOverheads:
    """The overheads of a run on so many devices: what was said, and for the rest what is usual.

    An interval that was said without a rate of storage stays: its writing is then counted at the usual rate.
    Checkpoints are written behind the steps, but for an interval that was said without saying that.
    """
    preemptions = said.preemptions_per_1000_node_days
    if preemptions is None and spot:
        preemptions = failure_file().spot.per_1000_node_days
    return dataclasses.replace(
        said,
        storage_bytes_per_s=said.storage_bytes_per_s or usual_storage_bytes_per_s(devices),
        checkpoint_every=said.checkpoint_every or BEST,
        checkpoint_async=said.checkpoint_async or said.checkpoint_every is None,
        preemptions_per_1000_node_days=preemptions,
    )


def usual_storage_bytes_per_s(devices: int) -> float:
    """What storage beside so many devices takes: a rate for each, of few not less than what one node of 8
    gets, and of each not more than its part of that."""
    terms, node = failure_file().storage, failure_file().node_devices
    of_a_node = terms.write_gb_per_s_of_a_node
    least = min(of_a_node, devices * of_a_node / node)
    return 1e9 * max(least, devices * terms.write_gb_per_s_per_device)


def overhead_assumptions(
    overheads: JobOverheads, device: Device, said: JobOverheads = NO_OVERHEADS
) -> tuple[Assumption, ...]:
    """The assumptions in the overheads of a run on a device: every figure that counts and was not stated."""
    found = [*_failures(overheads, device), *_checkpoints(overheads, said)]
    if overheads.checkpoint_every is None:
        return ()
    found += _restart(overheads)
    if overheads.preemptions_per_1000_node_days:
        found += _preemptions(overheads, said)
    return tuple(found)


def _failures(overheads: JobOverheads, device: Device) -> list[Assumption]:
    if overheads.failures_per_1000_node_days is not None:
        return []
    file = failure_file()
    rate = file.of(device.name)
    assumed = rate is not file.assumed and not file.measured(device.name)
    source = f"assumed as for {' and '.join(rate.devices)}: {rate.source}" if assumed else rate.source
    return [
        Assumption(
            what=f"failures of {device.title} in 1000 days of a node of {file.node_devices}",
            value=f"{rate.per_1000_node_days:g} ({rate.low:g} to {rate.high:g})",
            source=source,
            as_of=rate.as_of,
            flag="--failures",
        )
    ]


def _checkpoints(overheads: JobOverheads, said: JobOverheads) -> list[Assumption]:
    terms, found = failure_file().storage, []
    if said.checkpoint_every is None and overheads.checkpoint_every == BEST:
        found.append(
            Assumption(
                what="steps between checkpoints",
                value="as many as lose least, for each plan",
                source="Daly 2006 (doi 10.1016/j.future.2004.11.016)",
                as_of="2006",
                flag="--checkpoint-every",
            )
        )
    if overheads.checkpoint_async and not said.checkpoint_async:
        found.append(
            Assumption(
                what="writing of checkpoints",
                value="behind the steps, which wait for the copy to host memory",
                source="assumed: as torch.distributed.checkpoint's async_save and this program's runtime do",
                flag="--checkpoint-async",
            )
        )
    if said.storage_bytes_per_s is None and overheads.storage_bytes_per_s is not None:
        low, high = terms.low_gb_per_s_per_device, terms.high_gb_per_s_per_device
        found.append(
            Assumption(
                what="storage for checkpoints, written and read",
                value=f"{1000 * terms.write_gb_per_s_per_device:.0f} MB/s a device "
                f"({1000 * low:.0f} to {1000 * high:.0f}), of a node "
                f"{terms.write_gb_per_s_of_a_node:g} GB/s",
                source=terms.source,
                as_of=terms.as_of,
                flag="--storage",
            )
        )
    return found


def _restart(overheads: JobOverheads) -> list[Assumption]:
    file, found = failure_file(), []
    if overheads.restart_s is None:
        terms = file.restart
        found.append(
            Assumption(
                what="restart after a failure",
                value=f"{format_seconds(terms.fixed_s)} ({format_seconds(terms.low_s)} to "
                f"{format_seconds(terms.high_s)}) and the loading of the checkpoint",
                source=terms.source,
                as_of=terms.as_of,
                flag="--restart",
            )
        )
    if overheads.repair_s is None:
        found.append(
            Assumption(
                what="failed nodes",
                value="replaced while the job restarts; no spare nodes",
                source=file.repair.source,
                as_of=file.repair.as_of,
                flag="--repair, --spares",
            )
        )
    return found


def _preemptions(overheads: JobOverheads, said: JobOverheads) -> list[Assumption]:
    terms, found = failure_file().spot, []
    if said.preemptions_per_1000_node_days is None:
        found.append(
            Assumption(
                what="nodes taken back at a spot price, in 1000 node-days",
                value=f"{overheads.preemptions_per_1000_node_days:g} ({terms.low:g} to {terms.high:g})",
                source=terms.source,
                as_of=terms.as_of,
                flag="--preemptions",
            )
        )
    if overheads.preemption_notice_s is None:
        found.append(
            Assumption(
                what="notice before a node is taken back",
                value=format_seconds(terms.notice_s),
                source=terms.notice_source,
                as_of=terms.as_of,
                flag="--preemption-notice",
            )
        )
    if overheads.preemption_restart_s is None:
        found.append(
            Assumption(
                what="until there is another node at a spot price",
                value=f"{format_seconds(terms.wait_s)}, and a restart",
                source=terms.wait_source,
                as_of=terms.as_of,
                flag="--preemption-restart",
            )
        )
    return found
