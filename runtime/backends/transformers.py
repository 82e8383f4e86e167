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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from planner.errors import InputError, Problem
from runtime.transformer.head import Head

TESTED = ("gemma2", "gpt2", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3")
"""Types that tests run against their own whole model. Others hold state between layers or scale the
embedding in their forward, and would be silently wrong when cut into stages."""


class Layers(nn.Module):
    """Layers under the index that they have in the whole model; a sequence of them for their model."""

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


class NoPositions(nn.Module):
    """Stands for a table of positions on stages after the first: adds nothing."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)


class TransformersStage(nn.Module):
    """The layers [first, end) of a Hugging Face model, with the ends that belong to them, on meta.

    The input is tokens [B, S] on the first stage, else hidden states [B, S, H]. The output is, on the last
    stage, the mean loss over targets [B, S], or logits [B, S, V] without these; else hidden states.
    """

    def __init__(self, config: Any, first: int, end: int, *, with_embedding: bool, with_head: bool) -> None:
        super().__init__()
        whole = _on_meta(_config_of_layers(config, first, end))
        # Initial values depend on the depth of the whole model.
        whole.config.num_hidden_layers = config.num_hidden_layers
        base = getattr(whole, whole.base_model_prefix)
        self._names = _Names.of(base, whole.base_model_prefix)
        own = getattr(base, self._names.layers)
        layers = Layers({first + place: layer for place, layer in enumerate(own)})
        setattr(base, self._names.layers, layers)
        ties = bool(config.tie_word_embeddings)
        self._padding = getattr(base, self._names.embedding).padding_idx
        if not with_embedding:
            setattr(base, self._names.embedding, None)
            if self._names.positions is not None:
                setattr(base, self._names.positions, NoPositions())
        if with_head:
            cap = getattr(config, "final_logit_softcapping", None)
            with torch.device("meta"):
                whole.lm_head = Head(
                    config.hidden_size, config.vocab_size, bias=whole.lm_head.bias is not None, cap=cap
                )
        else:
            setattr(base, self._names.norm, nn.Identity())
            whole.lm_head = None
        self.whole = whole
        self.tied = ties and with_embedding and with_head
        self.shares_embedding = ties
        self.with_embedding, self.with_head = with_embedding, with_head
        self.tie()

    @property
    def base(self) -> Any:
        """The model without its head."""
        return getattr(self.whole, self._names.prefix)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers by the index that they have in the whole model."""
        return dict(getattr(self.base, self._names.layers).named_children())

    def tie(self) -> None:
        """Makes the head share the embedding's weight, where the config ties them."""
        if self.tied:
            self.whole.lm_head.weight = getattr(self.base, self._names.embedding).weight

    def units(self) -> Iterator[list[tuple[str, nn.Module]]]:
        """The embedding, each layer, the head: lists of named modules, every parameter in exactly one."""
        names, base = self._names, f"whole.{self._names.prefix}"
        ends = [names.embedding, names.positions, names.rotary]
        yield self._held(f"{base}.{name}" for name in ends if name is not None)
        for index in self.layers:
            yield self._held([f"{base}.{names.layers}.{index}"])
        yield self._held([f"{base}.{names.norm}", "whole.lm_head"])

    def _held(self, names: Iterable[str]) -> list[tuple[str, nn.Module]]:
        found = [(name, self.get_submodule(name)) for name in names if self._has(name)]
        return [(name, module) for name, module in found if not isinstance(module, NoPositions | nn.Identity)]

    def _has(self, name: str) -> bool:
        parent, _, last = name.rpartition(".")
        return self.get_submodule(parent)._modules.get(last) is not None

    def global_name(self, name: str) -> str:
        """The Hugging Face name of a parameter of this stage; a tied head is the embedding."""
        name = name.removeprefix("whole.")
        if self.shares_embedding and name == "lm_head.weight":
            return f"{self._names.prefix}.{self._names.embedding}.weight"
        return name

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
                if self.shares_embedding and name == "whole.lm_head" and self._padding is not None:
                    module.weight[self._padding] = 0  # as an embedding leaves the row of padding
        part.to(device)

    def apply_tensor_parallel(self, part: nn.Module, mesh: DeviceMesh) -> None:
        """Shards a part as the config's own plan for its family says; the head by rows, for the loss."""
        if isinstance(part, Head):
            part.shard(mesh, Replicate())
        elif part in self.layers.values():
            parallelize_module(part, mesh, dict(_styles(self.whole.config)), src_data_rank=None)

    def forward(self, x: Tensor, targets_bs: Tensor | None = None) -> Tensor:
        tokens = {"input_ids": x} if self.with_embedding else {"inputs_embeds": x}
        hidden: Tensor = self.base(**tokens, use_cache=False).last_hidden_state
        if not self.with_head:
            return hidden
        out: Tensor = self.whole.lm_head(hidden, targets_bs)
        return out


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
    """The projections of a layer and how they are split, by the config's `base_model_tp_plan`."""
    for pattern, style in (config.base_model_tp_plan or {}).items():
        _, _, name = pattern.partition("layers.*.")
        if style in _SPLITS:
            yield name, _SPLITS[style]()


def tensor_parallel_faults(config: Any) -> list[str]:
    """What of a family's own tensor-parallel plan is not plain columns and rows; empty where all is."""
    plan = config.base_model_tp_plan
    if not plan:
        return [f"{config.model_type} names no projections to split"]
    return [f"{name} is split as {style}" for name, style in plan.items() if style not in _SPLITS]


_SPLITS = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


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

    family = AutoModelForCausalLM._model_mapping[type(config)]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa" if family._supports_sdpa else "eager"
        )


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
