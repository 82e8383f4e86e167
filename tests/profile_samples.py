"""Profiles for tests of their page: the shipped ones, one with all that a profile can hold, and odd ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from planner.hardware.catalog import load_model, profile_files
from planner.hardware.local_machine import Clocks
from planner.model.attention import CpExchange
from planner.model.sublayer import Recompute
from planner.model.workload import Precision
from planner.profile.profile import (
    Constant,
    ContentionSample,
    LayerKind,
    LayerSample,
    OperatorKind,
    OperatorSample,
    Profile,
    load_profile,
    shape_key,
)
from planner.report.profile_tables import COPIES

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\"'"


def shipped() -> dict[str, Profile]:
    """The shipped profiles by file name."""
    return {path.stem: load_profile(path) for path in profile_files()}


def cpu() -> Profile:
    """The shipped profile of a CPU, without its sweeps."""
    whole = next(profile for profile in shipped().values() if profile.device == "cpu")
    return dataclasses.replace(whole, rates=())


def sample(
    model_name: str, kind: LayerKind = LayerKind.BLOCK, number: int = 0, **more: object
) -> LayerSample:
    """A sample whose times are in proportion to its tokens and shards."""
    model = load_model(model_name)
    block = list(model.classes().values())[number]
    made = LayerSample(
        kind=kind,
        shape_key=shape_key(model, kind, block),
        precision=Precision.BF16,
        recompute=Recompute.NONE,
        tp=1,
        sequence_parallel=False,
        micro_batch=1,
        seq=2048,
        forward_s=0.0,
        backward_s=0.0,
        saved_bytes=0,
        forward_transient_bytes=2**24,
        backward_transient_bytes=2**25,
        spread=0.02,
        samples=20,
    )
    made = dataclasses.replace(made, **more)  # type: ignore[arg-type]
    tokens = made.micro_batch * made.seq / made.cp
    forward_s = (1e-4 + 5e-7 * tokens / made.tp) * (0.8 if made.compiled else 1.0)
    return dataclasses.replace(
        made, forward_s=forward_s, backward_s=2.1 * forward_s, saved_bytes=int(70_000 * tokens / made.tp)
    )


def rich() -> Profile:
    """Several classes, lengths and kinds of shards, compiled ones, host times, noise, what was skipped."""
    layers = [
        sample("mixtral-8x7b-v0.1", micro_batch=b, seq=seq, tp=tp)
        for b in (1, 2, 4)
        for seq in (2048, 8192)
        for tp in (1, 4)
    ]
    layers += [
        sample("mixtral-8x7b-v0.1", ep=8),
        sample("mixtral-8x7b-v0.1", ep=8, etp=2, tp=4, micro_batch=2),
    ]
    layers += [sample("llama-3-8b", cp=4, cp_exchange=CpExchange.RING, seq=8192)]
    layers += [sample("llama-3-8b", compiled=True, micro_batch=b) for b in (1, 2)]
    layers += [
        sample("llama-3-8b", host_forward_s=9e-4, host_backward_s=2e-3, micro_batch=b) for b in (1, 2, 4)
    ]
    layers += [sample("gemma-2-9b", number=n, recompute=r) for n in (0, 1) for r in Recompute]
    layers += [sample("llama-3-8b", kind, spread=0.5) for kind in (LayerKind.EMBEDDING, LayerKind.HEAD)]
    layers += [dataclasses.replace(layers[0], shape_key="h1-unknown")]
    return dataclasses.replace(
        cpu(),
        name="h100 of a test",
        device="h100-sxm-80gb",
        device_title="NVIDIA H100 80GB HBM3",
        backend="nccl",
        devices_per_node=8,
        slots_per_node=None,
        cores=None,
        layers=tuple(layers),
        skipped=("head of llama-3-8b at tp 1: too little memory",),
        rates=rates(),
        clocks=Clocks(
            sm_hz=1.755e9,
            sm_lowest_hz=1.7e9,
            memory_hz=2.619e9,
            power_w=612.0,
            temperature_c=71.0,
            throttled={"SW power cap": 0.12, "HW slowdown": 0.0},
            samples=40,
        ),
        contention=(ContentionSample(active=1, slowdown=1.0),),
        constants=(
            Constant(name="gemm_flops", value=6.9e14, origin="measured: 8192^3 product in bf16"),
            Constant(name="host_block_forward_s", value=8e-4, origin="measured: a small block"),
        ),
    )


def rates() -> tuple[OperatorSample, ...]:
    """Every kind of operator at a few sizes, as a device of one rate and one bandwidth would take them."""
    found = []
    for kind in OperatorKind:
        for number in range(6):
            dims = tuple(96 * 2 ** ((number + place) % 6) for place in range(DIMS[kind]))
            seconds = 2e-6 + math.prod(dims) / (3e14 if DIMS[kind] > 2 else 1e12)
            found.append(
                OperatorSample(
                    kind=kind,
                    dims=dims,
                    precision=Precision.BF16,
                    variant="rmsnorm" if kind is OperatorKind.NORM else "",
                    forward_s=seconds,
                    backward_s=None if kind in COPIES or kind is OperatorKind.OPTIMIZER else 2.2 * seconds,
                    spread=0.03,
                    samples=20,
                )
            )
    return tuple(found)


DIMS = {
    **dict.fromkeys((OperatorKind.GROUPED, OperatorKind.ROUTING), 4),
    **dict.fromkeys(
        (OperatorKind.GEMM, OperatorKind.ATTENTION, OperatorKind.CROSS_ENTROPY, OperatorKind.EMBEDDING), 3
    ),
    **dict.fromkeys((OperatorKind.NORM, OperatorKind.ROTARY, OperatorKind.OPTIMIZER), 2),
    **dict.fromkeys((OperatorKind.ADD, OperatorKind.ACTIVATION, *COPIES), 1),
}
"""How many dims tell samples of a kind apart."""


def zero() -> Profile:
    """Times that were too short for the clock."""
    profile = single()
    layers = tuple(dataclasses.replace(s, forward_s=0.0, backward_s=0.0) for s in profile.layers)
    timeless = tuple(dataclasses.replace(s, forward_s=0.0, backward_s=None) for s in rates())
    return dataclasses.replace(
        profile,
        layers=layers,
        rates=timeless,
        comms=tuple(dataclasses.replace(s, seconds=0.0) for s in profile.comms),
    )


def hostile() -> Profile:
    """Names that are markup."""
    layers = tuple(dataclasses.replace(s, shape_key=HOSTILE) for s in cpu().layers[:3])
    constant = Constant(name=HOSTILE, value=1.0, origin=HOSTILE, framework=HOSTILE, kernels=HOSTILE)
    return dataclasses.replace(
        cpu(), name=HOSTILE, device_title=HOSTILE, backend=HOSTILE, versions={HOSTILE: HOSTILE},
        layers=layers, skipped=(HOSTILE,), constants=(constant,),
    )  # fmt: skip


def bare() -> Profile:
    """Nothing but its name."""
    return dataclasses.replace(cpu(), layers=(), comms=(), contention=(), constants=())


def single() -> Profile:
    """One layer and one collective."""
    return dataclasses.replace(cpu(), layers=cpu().layers[:1], comms=cpu().comms[:1])


SAMPLES: dict[str, Callable[[], Profile]] = {
    "rich": rich,
    "hostile": hostile,
    "bare": bare,
    "single": single,
    "zero": zero,
    **{name: (lambda own=profile: own) for name, profile in shipped().items()},
}
