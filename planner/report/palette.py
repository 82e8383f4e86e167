"""One colour for each cause, tenant and kind over the whole page, for light and for dark mode.

Hues follow Okabe and Ito's rule that neighbours differ in lightness too, so that charts stay readable for
colour-blind readers and in grey print. Passes share the family of compute: they are its two halves.
"""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.strategy.estimate import MEMORY_TENANTS, TIME_CAUSES


@frozen
class Colour:
    """A colour of the page: the name of its CSS variable, its value in light and in dark mode."""

    name: str
    light: str
    dark: str
    title: str = ""


COLOURS = (
    Colour(name="compute", light="#3b6fd4", dark="#6c9bf5", title="compute"),
    Colour(name="recompute", light="#4fb3cf", dark="#58c4e0", title="recompute"),
    Colour(name="tp_comm", light="#e07b1a", dark="#f09a45", title="TP communication"),
    Colour(name="cp_comm", light="#b59a00", dark="#d9c034", title="CP communication"),
    Colour(name="ep_comm", light="#c2579b", dark="#e07fbb", title="EP communication"),
    Colour(name="dp_comm", light="#d1453b", dark="#ef746a", title="DP communication"),
    Colour(name="pp_comm", light="#8455c9", dark="#ab86e8", title="pipeline transfer"),
    Colour(name="bubble", light="#aab1bd", dark="#5d6675", title="pipeline bubble"),
    Colour(name="optimizer", light="#2f9e62", dark="#4fc083", title="optimizer"),
    Colour(name="host", light="#8a6d55", dark="#b59579", title="host"),
    Colour(name="weights", light="#14808c", dark="#3fb0bd", title="weights"),
    Colour(name="grads", light="#b83280", dark="#dd6aa9", title="gradients"),
    Colour(name="activations", light="#5b67c7", dark="#8b97f0", title="activations"),
    Colour(name="transient", light="#dba32a", dark="#e8bb55", title="transient"),
    Colour(name="runtime", light="#77808f", dark="#929cac", title="runtime"),
    Colour(name="allocator", light="#b9bfc9", dark="#6f7887", title="allocator"),
    Colour(name="forward", light="#86aef0", dark="#8fb7fb", title="forward"),
    Colour(name="backward", light="#2f5fc4", dark="#4477dd", title="backward"),
    Colour(name="weight_grad", light="#1d3f8f", dark="#2c56b0", title="weight gradients"),
    Colour(name="predicted", light="#3b6fd4", dark="#6c9bf5", title="predicted"),
    Colour(name="measured", light="#c2410c", dark="#fb923c", title="measured"),
)

MARK_COLOURS = (
    Colour(name="mark_0", light="#0072b2", dark="#5aa9e6"),
    Colour(name="mark_1", light="#d55e00", dark="#ff9a4d"),
    Colour(name="mark_2", light="#00805c", dark="#3fd0a4"),
    Colour(name="mark_3", light="#b5568c", dark="#ef9fc9"),
    Colour(name="mark_4", light="#9a6b00", dark="#e6b84d"),
    Colour(name="mark_5", light="#6a4a9c", dark="#b99cec"),
    Colour(name="mark_6", light="#2b8cc4", dark="#8fd6ff"),
    Colour(name="mark_7", light="#5a6068", dark="#c4cad2"),
)
"""One for each shape of the plot of hardware: Okabe and Ito's, darker where needed on white."""


def colour_of(field: str) -> Colour:
    """The colour of a field of TimeBreakdown or MemoryBreakdown, or of a name in the table."""
    name = field.removesuffix("_s").removesuffix("_bytes")
    return next(colour for colour in COLOURS if colour.name == name)


def mark_colour(number: int) -> str:
    """The name of the mark colour of the curve, cloud or kind of this number; they come round again."""
    return MARK_COLOURS[number % len(MARK_COLOURS)].name


def variable(name: str) -> str:
    """The CSS text that a chart uses for a colour, so that the page's mode decides its value."""
    return f"var(--{name.replace('_', '-')})"


CAUSE_COLOURS = {field: colour_of(field) for field in TIME_CAUSES}
TENANT_COLOURS = {field: colour_of(field) for field in MEMORY_TENANTS}
