"""Stages of Hugging Face Transformers' own models.

A stage is their AutoModelForCausalLM with only the layers that it holds, its embedding on the first stage
and its final norm and head on the last. Their forward is run as it is: it makes masks and rotary angles
from the hidden states that come in. Layers keep the index that they have in the whole model, so that a
parameter has its Hugging Face name in every layout and a checkpoint is a Hugging Face state dict.

Models are built from a local config, never from a hub and never with code of a model repository.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from planner.foundation.errors import InputError, Problem
from planner.model.workload import Precision
from planner.strategy.plan import Plan
from planner.strategy.strategy import Degrees
from runtime.checkpoint.huggingface import check_config
from runtime.model.huggingface.files import SHOWN, files_of, local_box, open_file
from runtime.model.loss import Head
from runtime.parallel.meshes import Meshes
from runtime.parallel.offload import ActivationOffload
from runtime.parallel.parallelize import Backend
from runtime.parallel.tensor import apply_tensor_parallel
from runtime.train.executor import Executor
from runtime.train.options import TrainOptions

TESTED = ("gemma2", "gpt2", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3")
"""Types that tests run against their own whole model. Others hold state between layers or scale the
embedding in their forward, and would be silently wrong when cut into stages."""


class Layers(nn.Module):
    """Layers under the index that they have in the whole model: for their model a sequence of them, for
    ours the keys, values and items of a dict."""

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        for index, layer in layers.items():
            self.add_module(str(index), layer)

    def __getitem__(self, which: slice) -> list[nn.Module]:
        return [*self][which]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(module for module in self._modules.values() if module is not None)

    def __len__(self) -> int:
        return len(self._modules)

    def keys(self) -> Iterable[str]:
        return self._modules.keys()

    def values(self) -> list[nn.Module]:
        return [*self]

    def items(self) -> list[tuple[str, nn.Module]]:
        return list(zip(self.keys(), self, strict=True))


class NoPositions(nn.Module):
    """Stands for a table of positions on stages after the first: adds nothing."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)


class TransformersStage(nn.Module):
    """The layers [first, end) of a Hugging Face model, with the ends that belong to them, on meta.

    The input is tokens [B, S] on the first stage, else hidden states [B, S, H]. The output is, on the last
    stage, the mean loss over targets [B, S], or logits [B, S, V] without these; else hidden states. Its parts
    go by the names of our own transformer's; `global_name` gives those of Hugging Face.
    """

    def __init__(self, config: Any, first: int, end: int, *, with_embedding: bool, with_head: bool) -> None:
        super().__init__()
        whole = _on_meta(_config_of_layers(config, first, end))
        # Initial values depend on the depth of the whole model.
        whole.config.num_hidden_layers = config.num_hidden_layers
        base = getattr(whole, whole.base_model_prefix)
        self._names = names = _Names.of(base, whole.base_model_prefix)
        own = getattr(base, names.layers)
        setattr(base, names.layers, Layers({first + place: layer for place, layer in enumerate(own)}))
        self._padding = getattr(base, names.embedding).padding_idx
        if not with_embedding:
            setattr(base, names.embedding, None)
            if names.positions is not None:
                setattr(base, names.positions, NoPositions())
        if with_head:
            whole.lm_head = _head(whole)
        else:
            setattr(base, names.norm, nn.Identity())
            whole.lm_head = None
        self.shares_embedding = bool(config.tie_word_embeddings)
        self.tied = self.shares_embedding and with_embedding and with_head
        self.offload: ActivationOffload | None = None
        self.position_ids: Tensor | None = None
        # Registered before `whole`, so that parts are found by these names.
        self.tok_embeddings = getattr(base, names.embedding)
        self.positions = getattr(base, names.positions) if names.positions and with_embedding else None
        self.rotary = getattr(base, names.rotary) if names.rotary else None
        self.layers = getattr(base, names.layers)
        self.norm = getattr(base, names.norm) if with_head else None
        self.output = whole.lm_head
        self.whole = whole
        self.tie()

    @property
    def tied_name(self) -> str:
        """The global name of the weight that embedding and head share where the model ties them."""
        return self.global_name("tok_embeddings.weight")

    def tie(self) -> None:
        """Makes the head share the embedding's weight, where the config ties them."""
        if self.tied:
            self.output.weight = self.tok_embeddings.weight

    def units(self) -> Iterator[list[tuple[str, nn.Module]]]:
        """The embedding, each layer, the head: lists of named modules, every parameter in exactly one."""
        layers = [(f"layers.{index}",) for index in self.layers._modules]
        for names in (("tok_embeddings", "positions", "rotary"), *layers, ("norm", "output")):
            held = [name for name in names if "." in name or self._modules.get(name) is not None]
            if held:
                yield [(name, self.get_submodule(name)) for name in held]

    def global_name(self, name: str) -> str:
        """The Hugging Face name of a parameter of this stage; a tied head is the embedding."""
        part, _, rest = name.partition(".")
        if part == "output" and not (self.shares_embedding and rest == "weight"):
            return f"lm_head.{rest}"
        part = "tok_embeddings" if part == "output" else part
        return f"{self._names.prefix}.{getattr(self._names, _PARTS[part])}.{rest}"

    def materialize(self, name: str, part: nn.Module, *, seed: int, device: torch.device | str) -> None:
        """Gives a module on meta its initial values, by the model's own rule for each kind of module.

        The random stream of each module is that of (seed, its name), so values do not depend on layout.
        """
        part.to_empty(device="cpu")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for inner, module in reversed([*part.named_modules()]):
                full = self.global_name(f"{name}.{inner}.weight".replace("..", "."))
                digest = hashlib.sha256(f"{seed}:{full}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                self.whole._init_weights(module)
                if self.shares_embedding and module is self.output and self._padding is not None:
                    module.weight[self._padding] = 0  # as an embedding leaves the row of padding
        part.to(device)

    def apply_tensor_parallel(self, name: str, part: nn.Module, degrees: Degrees, meshes: Meshes) -> None:
        """Shards a layer as the config's own plan for its family says; the ends as our own model's are."""
        if name.startswith("layers.") and degrees.tp > 1:
            parallelize_module(part, meshes.tp, dict(_styles(self.whole.config)), src_data_rank=None)
        else:
            apply_tensor_parallel(name, part, degrees, meshes)

    def forward(self, x: Tensor, targets_bs: Tensor | None = None) -> Tensor:
        tokens = {"inputs_embeds": x if self.tok_embeddings is None else self.tok_embeddings(x)}
        hidden: Tensor = getattr(self.whole, self._names.prefix)(**tokens, use_cache=False).last_hidden_state
        if self.output is None:
            return hidden
        out: Tensor = self.output(hidden, targets_bs)
        return out


_PARTS = {
    "tok_embeddings": "embedding",
    "positions": "positions",
    "rotary": "rotary",
    "layers": "layers",
    "norm": "norm",
}
"""Our names of a model's parts, and the fields of `_Names` that have theirs."""


def _head(whole: Any) -> Head:
    """The head that gives the loss in chunks, as large as theirs and with its cap of logits."""
    config, biased = whole.config, whole.lm_head.bias is not None
    cap = getattr(config, "final_logit_softcapping", None)
    with torch.device("meta"):
        return Head(config.hidden_size, config.vocab_size, bias=biased, cap=cap)


@dataclass(frozen=True, slots=True)
class _Names:
    """What a family calls its parts. `positions` is a table of learned positions, `rotary` their angles."""

    prefix: str
    layers: str
    embedding: str
    norm: str
    positions: str | None
    rotary: str | None

    @classmethod
    def of(cls, base: nn.Module, prefix: str) -> _Names:
        children = dict(base.named_children())
        layers = next(name for name, child in children.items() if isinstance(child, nn.ModuleList))
        embeddings = [name for name, child in children.items() if isinstance(child, nn.Embedding)]
        norms = [name for name, child in children.items() if "Norm" in type(child).__name__]
        rotary = [name for name, child in children.items() if "Rotary" in type(child).__name__]
        return cls(
            prefix=prefix,
            layers=layers,
            embedding=embeddings[0],
            norm=norms[-1],
            positions=embeddings[1] if len(embeddings) > 1 else None,
            rotary=rotary[0] if rotary else None,
        )


def _styles(config: Any) -> Iterator[tuple[str, ParallelStyle]]:
    """The modules of a layer and how they are split, by the config's `base_model_tp_plan`."""
    for pattern, style in (config.base_model_tp_plan or {}).items():
        _, _, name = pattern.partition("layers.*.")
        yield name, _SPLITS[style]()


def tensor_parallel_faults(config: Any) -> list[str]:
    """What of a family's own tensor-parallel plan is not plain columns and rows; empty where all is."""
    plan = config.base_model_tp_plan
    if not plan:
        return [f"{config.model_type} names no projections to split"]
    return [f"{name} is split as {style}" for name, style in plan.items() if style not in _SPLITS]


_SPLITS: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    # Norms of the heads that a rank has: the input is a shard of heads, the weight's gradient a partial sum.
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}


def _config_of_layers(config: Any, first: int, end: int) -> Any:
    """The config of a model that is only the layers [first, end), with their own kinds of attention."""
    own = copy.deepcopy(config)
    kinds = getattr(own, "layer_types", None)
    if kinds is not None:
        own.layer_types = kinds[first:end]
    own.num_hidden_layers = end - first
    own.use_cache = False
    return own


def _on_meta(config: Any) -> Any:
    """The model of a config without storage, with torch's fused attention where its family has it."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM
    attention = "sdpa" if model._model_mapping[type(config)]._supports_sdpa else "eager"
    with torch.device("meta"):
        return model.from_config(config, attn_implementation=attention)


def load_config(path: Path) -> Any:
    """The local config of a model whose type is tested here. Raises InputError where it is not one."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import AutoConfig
    except ImportError:
        raise InputError(
            Problem(
                where="--backend transformers",
                fault="the package transformers is not installed.",
                fix="pip install 'transformers>=5.20,<6', or train with --backend native",
            )
        ) from None
    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").is_file():
        raise InputError(Problem(where=f"--hf-config {path}", fault="holds no config.json."))
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(
            Problem(where=str(folder / "config.json"), fault=f"cannot be read: {text}")
        ) from None
    if config.model_type not in TESTED:
        raise InputError(
            Problem(
                where=str(folder / "config.json"),
                fault=f"is a {config.model_type}, which is not known to be right when cut into stages.",
                legal=", ".join(TESTED),
                fix="train it with --backend native, if plan check says that it can be",
            )
        )
    return config


def backend_of(options: TrainOptions) -> Backend | None:
    """The backend of a run's options; None for our own transformer."""
    return None if options.hf_config is None else transformers_backend(load_config(Path(options.hf_config)))


def transformers_backend(config: Any) -> Backend:
    """The backend that builds every stage from this config."""

    def stage(plan: Plan, index: int) -> TransformersStage:
        own, last = plan.strategy.stages[index], plan.strategy.degrees.stages - 1
        return TransformersStage(
            config, own.first, own.end, with_embedding=index == 0, with_head=index == last
        )

    return Backend(stage=stage, tensor_parallel=TransformersStage.apply_tensor_parallel)


def check_backend(plan: Plan, path: Path) -> None:
    """Raises InputError with everything in which the config is not the plan's model, or in which the plan
    asks for what their models cannot do."""
    config = load_config(path)
    check_config(path if path.is_file() else path / "config.json", plan.model)
    degrees, workload = plan.strategy.degrees, plan.workload
    copied = plan.model.heads_copied(degrees.tp)
    faults = {
        "it shares out the sequence over cp ranks": degrees.cp > 1,
        "it shares out experts over ep ranks": degrees.ep > 1,
        "it shares out the sequence over tp ranks (sequence_parallel)": degrees.sequence_parallel,
        f"it has copies of key-value heads over tp={degrees.tp} ranks": bool(copied),
        f"it splits the vocabulary into {degrees.tp} unequal parts": plan.model.vocab % degrees.tp > 0,
        "it trains adapters": workload.adapters is not None,
        "its products are in fp8": workload.precision is Precision.FP8,
    }
    found = [fault for fault, is_so in faults.items() if is_so]
    found += tensor_parallel_faults(config) if degrees.tp > 1 else []
    if found:
        raise InputError(
            Problem(
                where="--backend transformers",
                fault=f"cannot execute this plan: {'; '.join(found)}.",
                legal="data, pipeline and (where the family names plain columns and rows) tensor parallelism",
                fix="solve with --fix cp=1 --fix sequence_parallel=false, or train with --backend native",
            )
        )


def load_into(executor: Executor, folder: Path) -> None:
    """Fills the weights of this rank from a folder of safetensors with Hugging Face's names."""
    files = {key: name for name, keys in files_of(folder).items() for key in keys}
    named = list(executor.weight_tensors())
    missing = sorted({name for name, _ in named} - files.keys())
    if missing:
        raise InputError(
            Problem(
                where=str(folder),
                fault=f"lacks {', '.join(missing[:SHOWN])} ({len(missing)} tensors missing).",
            )
        )
    with torch.no_grad():
        for name, tensor in named:
            local, box = local_box(tensor)
            stored = open_file(folder / files[name]).get_slice(name)
            if list(stored.get_shape()) != list(tensor.shape):
                fault = f"is of shape {list(stored.get_shape())}, the model has {list(tensor.shape)}."
                raise InputError(Problem(where=f"{folder / files[name]}: {name}", fault=fault))
            local.copy_(stored[tuple(slice(begin, end) for begin, end in box)])
    executor.weights_filled()
