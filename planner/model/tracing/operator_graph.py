"""OperatorGraph: what one forward pass of a module computes, operator by operator, as tracing saw it.

It is plain data: the runtime writes it, the planner linearises it. Values are tensors with storage of
their own; views are not operators, and a write in place makes a new value. Parameters and buffers are not
values: every stage has its own.
"""

from __future__ import annotations

from planner.foundation.frozen import frozen
from planner.model.traced_layer import Product


@frozen
class Value:
    """A tensor of `size` values of the compute precision, of one sample.

    `differentiable` tells apart float inputs, and results of parameters and of other such values, from
    masks and indices, which any stage computes again from the inputs.
    """

    size: float
    differentiable: bool
    is_input: bool = False


@frozen
class ParameterTensor:
    """One parameter tensor; a tied one has several names and is still one tensor."""

    name: str
    count: int


@frozen
class Operator:
    """One operator call. Operands are indices into the graph's values and parameters.

    `signature` holds the operator's name, its constants and the shapes of its operands: two calls of the
    same signature cost the same. `scope` is the path of the innermost module that called it. `saves` are
    the values that autograd keeps for it.
    """

    signature: str
    scope: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    parameters: tuple[int, ...] = ()
    saves: tuple[int, ...] = ()
    products: tuple[Product, ...] = ()
    core_flops: float = 0.0
    moved_values: float = 0.0


@frozen
class OperatorGraph:
    """The operators of a forward pass in the order in which they ran.

    All figures are of one sample: those of the batch that was traced, divided. `tokens` is what a sample
    stands for in the workload's sequence. `unused` are parameters that the forward pass does not meet, each
    with the operator whose module holds it.
    """

    tokens: int
    operators: tuple[Operator, ...]
    values: tuple[Value, ...]
    parameters: tuple[ParameterTensor, ...]
    unused: tuple[tuple[int, int], ...] = ()
