"""The software that a plan for an engine is priced by: its Stack, under the name that a profile knows."""

from __future__ import annotations

from planner.calibration.software import run_engine, titan_flash_is_amperes
from planner.hardware.cluster import ClusterSpec
from planner.job.engine_settings import Engine, Stack, own_stack
from planner.profile.profile import Profile

TITLES = {
    Engine.NATIVE: "the native runtime",
    Engine.TORCHTITAN: "torchtitan",
    Engine.MEGATRON: "Megatron-LM with --overlap-grad-reduce",
    Engine.DEEPSPEED: "DeepSpeed",
}


def engine_stack(engine: Engine, profile: Profile | None, cluster: ClusterSpec) -> Stack:
    """The engine as its own recipes run it: flash attention, gradients reduced early where it can.

    Megatron-LM can with --overlap-grad-reduce, which its guide recommends; DeepSpeed reduces after the last
    backward pass. On Hopper torchtitan's attention is PyTorch's FlashAttention-2.
    """
    if engine is Engine.NATIVE:
        return own_stack(cluster)
    titan = engine is Engine.TORCHTITAN
    return Stack(
        engine=engine,
        framework=fitted_framework(engine, profile),
        ampere_flash=titan and all(map(titan_flash_is_amperes, (g.device.name for g in cluster.groups))),
        overlaps_gradients=engine is Engine.MEGATRON,
    )


def fitted_framework(engine: Engine, profile: Profile | None) -> str:
    """The one framework of this engine that a profile's constants were fitted for; "" where none or several.

    Without one the constants of the engine's family hold. Megatron-DeepSpeed sums gradients in its own way
    (Stack.accumulates_beside), and stands for neither engine.
    """
    if profile is None or engine is Engine.NATIVE:
        return ""
    names = {constant.framework for constant in profile.constants if constant.framework}
    own = {name for name in names if run_engine(name) is engine and not _of_both(name)}
    return own.pop() if len(own) == 1 else ""


def _of_both(framework: str) -> bool:
    name = framework.lower()
    return "megatron" in name and "deepspeed" in name


def priced_as(stack: Stack, profile: Profile | None) -> str:
    """In words, whose software the figures are of, and what of it a profile was fitted to."""
    family, constants = stack.engine.family, profile.constants if profile is not None else ()
    fitted = [f"its family ({family})"] if any(c.engine == family for c in constants) else []
    fitted += [stack.framework] if stack.framework else []
    known = f"by constants of {' and of '.join(fitted)}" if fitted else "of which no run was fitted"
    measured = profile is not None and profile.layers and family != Engine.NATIVE.family
    return f"priced as {TITLES[stack.engine]}, {known}" + (
        "; layers as measured natively" if measured else ""
    )
