"""Tracing an arbitrary nn.Module into a ModelSpec, on fake tensors: no memory, no data, no device.

The forward pass runs once in training form under FakeTensorMode. Below autograd, every operator that
makes a new tensor is recorded with its shapes, FLOPs and bytes; beside it, autograd tells which tensors it
keeps for the backward pass. The recorded graph is linearised by the planner (planner.model.traced_graph),
equal
pieces become layer classes.

Tracing happens as on a CPU: kernels are those that torch picks there (fused attention, norms in parts).
What a module computes must not depend on the data: a shape or a branch that does is named in an error.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from planner.foundation.errors import InputError, Problem
from planner.model.spec import ModelSpec
from planner.model.traced_graph import Operator, OperatorGraph, ParameterTensor, Value
from planner.model.traced_model import traced_model
from runtime.model.trace_costs import in_values, of_a_sample, values_of, work_of


def trace_module(
    module: nn.Module,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    name: str,
    tokens: int | None = None,
) -> ModelSpec:
    """A ModelSpec of any module, from one forward pass on fake tensors of the shapes of these inputs.

    The batch is the first dimension of the first input. A sample stands for `tokens` tokens of a workload;
    default: the length of a row of token indices, 1 for other inputs, so that a workload's `seq` is that.
    The module may be on meta and is left as it is. What is outside of its forward pass is not counted: let
    it return the loss to have that counted too. Raises InputError where tracing cannot follow it.
    """
    graph = trace_operators(module, example_inputs, example_kwargs, tokens=tokens)
    shapes = ", ".join(str(list(t.shape)) for t in _tensors((example_inputs, dict(example_kwargs or {}))))
    source = f"traced from {type(module).__module__}.{type(module).__qualname__} on inputs of {shapes}"
    return traced_model(graph, name=name, sources=(f"{source} by torch {torch.__version__}",))


def trace_operators(
    module: nn.Module,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    tokens: int | None = None,
) -> OperatorGraph:
    """The operators of one forward pass of a module, with what autograd keeps of it."""
    _check_initialised(module)
    kwargs = dict(example_kwargs or {})
    batch, row = _batch_and_row(_tensors((example_inputs, kwargs)))
    recorder = _Recorder(_compute_dtype(module), batch)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with _torch_aside(), fakes, _Scopes(module, recorder), _faults_of(recorder):
        tensors = _fake_tensors(module, recorder)
        args, kwargs = tree_map_only(Tensor, _fake, (tuple(example_inputs), kwargs))
        recorder.take_inputs(_tensors((args, kwargs)))
        with recorder.recording():
            torch.func.functional_call(module, tensors, args, kwargs, tie_weights=False)
    if not recorder.operators:
        raise InputError(Problem(where=type(module).__qualname__, fault="computes nothing: no operator ran."))
    return recorder.graph(row if tokens is None else tokens)


@contextlib.contextmanager
def _torch_aside() -> Iterator[None]:
    """Without torch's log of what fails on fake tensors, which is raised anyway, and without mkldnn.

    With mkldnn a recurrent layer is one opaque operator; without, it is the products that it is made of.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, mkldnn = logger.disabled, torch._C._get_mkldnn_enabled()
    logger.disabled = True
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        logger.disabled = disabled
        torch._C._set_mkldnn_enabled(mkldnn)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _batch_and_row(inputs: list[Tensor]) -> tuple[int, int]:
    """Samples of the first input, and tokens of one sample: of indices [batch, length], the length."""
    if not inputs or inputs[0].dim() == 0 or inputs[0].shape[0] < 1:
        raise InputError(
            Problem(
                where="example_inputs",
                fault="hold no tensor whose first dimension is the batch.",
                fix="pass a tensor of shape [1, ...], such as torch.zeros(1, 3, 224, 224, device='meta')",
            )
        )
    first = inputs[0]
    return first.shape[0], 1 if first.is_floating_point() or first.dim() < 2 else first.shape[1]


def _check_initialised(module: nn.Module) -> None:
    lazy = [n for n, p in module.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise InputError(
            Problem(
                where=f"parameter {lazy[0]}",
                fault=f"has no shape yet, as {len(lazy)} of a lazy module.",
                fix="run the module once before it is traced",
            )
        )


def _compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of most parameters, which a workload's precision takes the place of."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.get_default_dtype()


def _fake(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype without memory. Call it under FakeTensorMode."""
    fake = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="cpu")
    return fake.requires_grad_(tensor.requires_grad)


def _fake_tensors(module: nn.Module, recorder: _Recorder) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have, as fake tensors, which the recorder learns of."""
    fakes: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in fakes:
            fakes[id(parameter)] = _fake(parameter)
            recorder.take_parameter(name, fakes[id(parameter)])
        tensors[name] = fakes[id(parameter)]
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if id(buffer) not in fakes:
            fakes[id(buffer)] = _fake(buffer)
            recorder.take_constant(fakes[id(buffer)])
        tensors[name] = fakes[id(buffer)]
    return tensors


@contextlib.contextmanager
def _faults_of(recorder: _Recorder) -> Iterator[None]:
    """Turns what stops a trace into an InputError that names the operator and the module."""
    try:
        yield
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        dynamic = isinstance(error, DynamicOutputShapeException)
        what = "the shape of its result" if dynamic else "a number or a branch taken from its result"
        raise InputError(
            Problem(
                where=recorder.where,
                fault=f"{error.func} cannot be traced: {what} depends on the data.",
                fix="compute it with shapes that are known: experts by one-hot weights and einsum, or "
                "torch.topk and gather with a fixed capacity, in place of nonzero, masks as indices, "
                ".item() and `if tensor:`",
            )
        ) from error
    except UnsupportedOperatorException as error:
        raise InputError(
            Problem(
                where=recorder.where,
                fault=f"{error.func} cannot be traced: it says nothing of the shape of its result.",
                fix="register one for it with torch.library.register_fake",
            )
        ) from error
    except InputError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            Problem(
                where=recorder.where,
                fault=f"the forward pass failed on tensors without data: {type(error).__name__}: {lines[0]}",
                fix="check that it runs on inputs of these shapes, and that it keeps to the device of its "
                "inputs (tracing is done on the CPU)",
            )
        ) from error


class _Scopes:
    """Tells the recorder which module runs, by hooks that are removed again."""

    def __init__(self, module: nn.Module, recorder: _Recorder) -> None:
        self.module, self.recorder = module, recorder
        self.handles: list[Any] = []

    def __enter__(self) -> _Scopes:
        for name, part in self.module.named_modules():
            self.handles.append(part.register_forward_pre_hook(self._enter(name), prepend=True))
            self.handles.append(part.register_forward_hook(self._leave(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self.recorder.scopes.append(name)

        return enter

    def _leave(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, result: Any) -> None:
            while self.recorder.scopes.pop() != name:
                pass  # a module inside that raised, and was caught, did not leave

        return leave


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operators below autograd, and what autograd packs.

    A tensor is known by its storage, so a view is the value that it views. Storages are kept alive: the
    address of a freed one could come back as another's.
    """

    def __init__(self, compute: torch.dtype, batch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.compute, self.batch = compute, batch
        self.scopes: list[str] = []
        self.operators: list[dict[str, Any]] = []
        self.values: list[Value] = []
        self.parameters: list[ParameterTensor] = []
        self._alive: list[Tensor] = []
        self._value_of: dict[int, int] = {}
        self._parameter_of: dict[int, int] = {}
        self._constants: set[int] = set()
        self._at_sequence: dict[int, int] = {}
        self._packed: list[tuple[int, int, int]] = []

    @property
    def where(self) -> str:
        """The module in which tracing stopped."""
        scope = self.scopes[-1] if self.scopes else ""
        return f"module {scope}" if scope else "the module"

    # What is there before the pass

    def take_parameter(self, name: str, tensor: Tensor) -> None:
        """A parameter tensor; tied ones are met once."""
        self._parameter_of[self._storage(tensor)] = len(self.parameters)
        self.parameters.append(ParameterTensor(name=name, count=tensor.numel()))

    def take_constant(self, tensor: Tensor) -> None:
        """A buffer: neither a parameter nor a value."""
        self._constants.add(self._storage(tensor))

    def take_inputs(self, tensors: list[Tensor]) -> None:
        """The inputs of the pass."""
        for tensor in tensors:
            self._new_value(tensor, differentiable=tensor.is_floating_point(), is_input=True)

    def _storage(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        return int(tensor.untyped_storage()._cdata)

    def _new_value(self, tensor: Tensor, *, differentiable: bool, is_input: bool = False) -> int:
        size = in_values(tensor.untyped_storage().nbytes(), tensor.dtype, self.compute) / self.batch
        self._value_of[self._storage(tensor)] = len(self.values)
        self.values.append(Value(size=size, differentiable=differentiable, is_input=is_input))
        return len(self.values) - 1

    # The pass

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records operators and saved tensors; gradients are on, whatever the caller has set."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        with torch.enable_grad(), hooks, self:
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = self._storage(tensor)
        if storage in self._value_of:
            self._packed.append((_get_sequence_nr(), len(self.operators) - 1, self._value_of[storage]))
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = _tensors(out)
        if made:
            self._record(func, args, kwargs, out, made)
        return out

    def _record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, made: list[Tensor]
    ) -> None:
        read = _tensors((args, kwargs))
        before = {self._storage(tensor) for tensor in read}
        written = _written(func, args, kwargs)
        fresh = [tensor for tensor in made if self._storage(tensor) not in before]
        if not fresh and not written:
            return  # a view
        reads = [self._value_of[s] for t in read if (s := self._storage(t)) in self._value_of]
        parameters = [self._parameter_of[s] for t in read if (s := self._storage(t)) in self._parameter_of]
        differentiable = bool(parameters) or any(self.values[v].differentiable for v in reads)
        floating = any(tensor.is_floating_point() for tensor in (*fresh, *written))
        writes = self._write([*written, *fresh], differentiable=differentiable and floating)
        work = work_of(func, args, kwargs, out)
        moved = sum(values_of(t, self.compute) for t in read if self._storage(t) in self._value_of)
        moved += sum(values_of(t, self.compute) for t in (*fresh, *written))
        self._at_sequence.setdefault(_get_sequence_nr(), len(self.operators))
        self.operators.append(
            {
                "signature": self._signature(func, args, kwargs, made),
                "scope": self.scopes[-1] if self.scopes else "",
                "reads": tuple(reads),
                "writes": tuple(writes),
                "parameters": tuple(dict.fromkeys(parameters)),
                "products": tuple(
                    of_a_sample(product, self.batch, weights=bool(parameters)) for product in work.products
                ),
                "core_flops": work.core_flops / self.batch,
                "moved_values": 0.0 if work.products or work.core_flops else moved / self.batch,
            }
        )

    def _write(self, tensors: list[Tensor], *, differentiable: bool) -> list[int]:
        """New values for these tensors; what is written into parameters and buffers is none."""
        writes: dict[int, int] = {}
        for tensor in tensors:
            storage = self._storage(tensor)
            known = storage in self._parameter_of or storage in self._constants
            if not known and storage not in writes:
                writes[storage] = self._new_value(tensor, differentiable=differentiable)
        return list(writes.values())

    def _signature(self, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> str:
        """Name, shapes of operands (with what they are) and results, and constants but for floats."""
        leaves = [self._leaf(leaf) for leaf in tree_leaves((args, kwargs))]
        results = [f"{tuple(t.shape)}{t.dtype}" for t in made]
        return f"{func}({','.join(leaves)})->{','.join(results)}"

    def _leaf(self, leaf: Any) -> str:
        if isinstance(leaf, Tensor):
            storage = self._storage(leaf)
            kind = "p" if storage in self._parameter_of else "v" if storage in self._value_of else "c"
            return f"{kind}{tuple(leaf.shape)}{tuple(leaf.stride())}{leaf.dtype}"
        return "float" if isinstance(leaf, float) else str(leaf) if isinstance(leaf, (int, str)) else ""

    # After the pass

    def graph(self, tokens: int) -> OperatorGraph:
        """The recorded operators, each with what autograd keeps for it."""
        saves: dict[int, dict[int, None]] = {}
        for sequence, latest, value in self._packed:
            operator = self._at_sequence.get(sequence, max(latest, 0))
            saves.setdefault(operator, {})[value] = None
        return OperatorGraph(
            tokens=tokens,
            operators=tuple(
                Operator(**recorded, saves=tuple(saves.get(index, ())))
                for index, recorded in enumerate(self.operators)
            ),
            values=tuple(self.values),
            parameters=tuple(self.parameters),
            unused=self._unused(),
        )

    def _unused(self) -> tuple[tuple[int, int], ...]:
        """Parameters that no operator meets, with the last operator of the module nearest to them."""
        used = {p for recorded in self.operators for p in recorded["parameters"]}
        last = {recorded["scope"]: index for index, recorded in enumerate(self.operators)}
        missing = [index for index in range(len(self.parameters)) if index not in used]
        return tuple((index, self._nearest(self.parameters[index].name, last)) for index in missing)

    @staticmethod
    def _nearest(name: str, last: dict[str, int]) -> int:
        parts = name.split(".")
        for length in range(len(parts) - 1, 0, -1):
            prefix = ".".join(parts[:length])
            inside = [i for s, i in last.items() if s == prefix or s.startswith(prefix + ".")]
            if inside:
                return max(inside)
        return max(last.values())


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into: in place, or given as `out`."""
    if not func._schema.is_mutable:
        return []
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            found += _tensors(given)
    return found
