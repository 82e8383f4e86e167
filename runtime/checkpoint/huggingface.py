"""Adapters as PEFT's files, adapter_model.safetensors and adapter_config.json: those of a checkpoint, and of
a folder that a run begins with.

Keys are those of peft's LoRA on a Hugging Face model: base_model.model. + the module's own name +
.lora_A.weight [r, in] or .lora_B.weight [out, r] (peft, utils/save_and_load.py). An adapter counts alpha / r
times, or alpha / sqrt(r) with use_rslora; rank_pattern and alpha_pattern have those of single modules, by the
ends of their names (peft, tuners/lora/config.py).

A Hugging Face folder as the beginning of a run: its model must be the plan's, and its files are kept.

Weights of a LoRA run with its adapters in them: W + s B A where a projection has an adapter, W elsewhere.

W is taken as the run computed with it, in the compute precision; the sum is in fp32.

Exports a checkpoint of a run as a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from planner.foundation.decode import encode, load_json_object, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.run_files import CHECKPOINTS, PLAN
from planner.model.feed_forward import MLP_MODULES
from planner.model.huggingface import read_config_file
from planner.model.lora import adapts, module_names
from planner.model.spec import ModelSpec
from planner.model.workload import Adapters
from planner.strategy.engines.native import check_executed
from planner.strategy.plan import Plan, load_plan
from runtime.checkpoint.checkpoint import load_checkpoint
from runtime.checkpoint.store import CheckpointIndex, committed_folders, find_checkpoint, load_index, verify
from runtime.model.huggingface.files import (
    Box,
    ReadParameter,
    WeightFolder,
    local_box,
    open_file,
    write_weights,
)
from runtime.model.huggingface.names import names_of
from runtime.model.lora import (
    A,
    B,
    PeftModule,
    check_base,
    named_modules,
    peft_modules,
    scale_of,
    sums_of,
    targets,
)
from runtime.model.precision import compute_dtype

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HALVES = {A: "lora_A", B: "lora_B"}
UNLIKE = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "modules_to_save"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "target_parameters"),
)
"""Settings of PEFT under which adapters compute otherwise, or something else is trained too."""
UNREAD = (
    "peft 0.21 takes gate_proj, up_proj and down_proj of a model with experts for modules of these, so that "
    "it does not find those of its dense layers: merge them instead (plan export-weights --merge-adapters)"
)
"""Source: peft, utils/transformers_weight_conversion.py, `_convert_peft_config_moe`; with transformers 5."""
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the model's weights as they are."""
MOST_ALPHA = 1e9
PLAIN_NAME = re.compile(r"[\w.]+")
"""A pattern that is a name. Others are regular expressions, which may take for ever."""
BEFORE = "base_model.model."
PREFIX = "executor/model."
"""Of the names of weights in a run's checkpoints (runtime.train.session)."""


def export_adapters(
    checkpoint: Path, model: ModelSpec, adapters: Adapters, folder: Path, *, alpha: float | None
) -> Path:
    """Writes the adapters of a committed checkpoint to `folder`. One process does it.

    Raises InputError for a family whose modules have no names in Hugging Face's files, and for a checkpoint
    without adapters.
    """
    found = read_adapters(checkpoint)
    if not found:
        raise InputError(Problem(where=str(checkpoint), fault="holds no adapters.", fix="train with LoRA"))
    return write_adapters(found, model, adapters, folder, alpha=alpha)


def write_adapters(
    found: Mapping[str, Tensor], model: ModelSpec, adapters: Adapters, folder: Path, *, alpha: float | None
) -> Path:
    """Writes whole halves of adapters, by our names, as PEFT's files."""
    modules, tensors = peft_modules(model, adapters), {}
    for module in modules:
        halves = {path: (found[f"{path}.{A}"], found[f"{path}.{B}"]) for path, _ in module.members}
        for half, whole in zip(HALVES, module.join(halves), strict=True):
            tensors[peft_key(module.name, half)] = whole.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = _config(model, adapters, alpha, modules)
    write_atomic(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def say_export(checkpoint: Path, plan: Plan, folder: Path, *, alpha: float | None) -> str:
    """Exports the adapters of a run that ends; what to say of it."""
    assert plan.workload.adapters is not None
    try:
        export_adapters(checkpoint, plan.model, plan.workload.adapters, folder, alpha=alpha)
    except InputError as error:
        return f"no adapters for PEFT: {error}"
    told = f"adapters for PEFT are in {folder}"
    return f"{told}; {UNREAD}" if _unread(plan.model, plan.workload.adapters) else told


def _unread(model: ModelSpec, adapters: Adapters) -> bool:
    dense = set(module_names(model)) & set(MLP_MODULES)
    return bool(model.experts) and any(adapts(adapters.modules, name) for name in dense)


def read_adapters(checkpoint: Path) -> dict[str, Tensor]:
    """The whole halves of all adapters of a checkpoint, by our names, put together from their boxes."""
    index = load_index(checkpoint)
    found = {}
    for name, stored in index.tensors.items():
        if not name.startswith(PREFIX) or name.rsplit(".", 1)[1] not in HALVES:
            continue
        whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        for chunk in stored.chunks:
            with safe_open(checkpoint / chunk.file, framework="pt") as file:
                box = tuple(slice(o, o + s) for o, s in zip(chunk.offset, chunk.shape, strict=True))
                whole[box] = file.get_tensor(f"{name}@{chunk.key}")
        found[name.removeprefix(PREFIX)] = whole
    return found


class AdapterFolder:
    """The files that a run takes its first adapters from; each rank reads its own slices only."""

    def __init__(self, folder: Path, plan: Plan, *, alpha: float | None) -> None:
        """Raises InputError with all in which the folder's adapters are others than the plan's."""
        adapters = plan.workload.adapters
        assert adapters is not None
        self.folder, self._model = folder, plan.model
        self._modules = peft_modules(plan.model, adapters)
        self._of_path = {path: module for module in self._modules for path, _ in module.members}
        config = load_json_object(folder / ADAPTER_CONFIG)
        problems = [
            Problem(
                where=f"{folder / ADAPTER_CONFIG}: {key[:80]}",
                fault=f"is {repr(found)[:60]}, adapters of runs need {legal}.",
            )
            for key, found, legal in _unlike(config)
        ]
        if problems:
            raise InputError(*problems)
        self._file = open_file(folder / ADAPTER_WEIGHTS)
        self._check_tensors()
        self._check_scales(config, scale_of(adapters, alpha), adapters.rank)
        self._check_rows()

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fills those of a rank's weights, by our names, that are halves of adapters."""
        with torch.no_grad():
            for name, tensor in weights:
                path, half = name.rsplit(".", 1)
                if half not in HALVES:
                    continue
                local, box = local_box(tensor)
                module = self._of_path[path]
                stored, rank = self._slice(module, half), self._ranks[module.name]
                if half == A:
                    local.copy_(stored[_cut(module.box_of_a(path, box, rank))])
                else:
                    for rows, part in module.boxes_of_b(path, box, rank):
                        local[rows].copy_(stored[_cut(part)])

    def _slice(self, module: PeftModule, half: str) -> Any:
        return self._file.get_slice(peft_key(module.name, half))

    def _check_tensors(self) -> None:
        found = {key: list(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118
        expected: dict[str, list[int]] = {}
        for module in self._modules:
            keys = [peft_key(module.name, half) for half in HALVES]
            legal = {module.rank, module.written_rank}
            rank = next((r for r in legal if found.get(keys[0]) == [r, module.shape[1]]), module.rank)
            expected |= dict(zip(keys, ([rank, module.shape[1]], [module.shape[0], rank]), strict=True))
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if wrong:
            first, *_ = wrong
            told = f"{first} is {found.get(first, 'missing')}, the model has {expected.get(first, 'none')}"
            fault = f"has other tensors than the run's adapters: {told} ({len(wrong)} differ)."
            raise InputError(
                Problem(where=str(self.folder / ADAPTER_WEIGHTS), fault=fault, fix=self._fix(found))
            )
        self._ranks = {m.name: expected[peft_key(m.name, A)][0] for m in self._modules}

    def _fix(self, found: Mapping[str, list[int]]) -> str:
        """The flags of a plan that has the adapters of a file."""
        end = f".{HALVES[A]}.weight"
        ranks = {key: shape[0] for key, shape in found.items() if key.endswith(end) and shape}
        names = named_modules(self._model, (key.removeprefix(BEFORE).removesuffix(end) for key in ranks))
        return f"solve with {_flags(min(ranks.values()), names)}" if names else ""

    def _check_scales(self, config: Mapping[str, Any], scale: float, rank: int) -> None:
        power = 0.5 if config.get("use_rslora") else 1.0
        counts = {m.name: _alpha(config, m.name) / self._ranks[m.name] ** power for m in self._modules}
        others = {name: each for name, each in counts.items() if not math.isclose(each, scale, rel_tol=1e-6)}
        if others:
            name, each = next(iter(others.items()))
            fault = f"makes the adapter of {name} count {each:g} times, the run's count {scale:g} times."
            same = len(set(counts.values())) == 1
            fix = f"give --lora-alpha {each * rank:g}" if same else "a run's adapters all count alike"
            raise InputError(
                Problem(where=f"{self.folder / ADAPTER_CONFIG}: lora_alpha", fault=fault, fix=fix)
            )

    def _check_rows(self) -> None:
        """What a fused module's adapter adds to projections without one in the run must be nothing."""
        for module in self._modules:
            if module.fused and bool(module.left_over(self._slice(module, B)[:]).any()):
                fault = f"its adapter of {module.name} is not one of rank {module.rank} of each of "
                fault += f"{', '.join(path for path, _ in module.members)} alone."
                flags = _flags(self._ranks[module.name], named_modules(self._model, self._ranks))
                fix = f"solve with {flags}"
                raise InputError(Problem(where=str(self.folder / ADAPTER_WEIGHTS), fault=fault, fix=fix))


def _flags(rank: int, names: list[str]) -> str:
    return f"--lora-rank {rank} --lora-modules {','.join(names)}"


def peft_key(module: str, half: str) -> str:
    """PEFT's key for a half of the adapter of a module of the Hugging Face model."""
    return f"{BEFORE}{module}.{HALVES[half]}.weight"


def _cut(box: Box) -> tuple[slice, ...]:
    return tuple(slice(begin, end) for begin, end in box)


def _unlike(config: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """Settings of a config under which adapters are others than ours: key, value, what is legal."""
    if config.get("peft_type") != "LORA":
        yield "peft_type", config.get("peft_type"), "'LORA'"
    if config.get("bias", "none") != "none":
        yield "bias", config["bias"], "'none'"
    for key in UNLIKE:
        if config.get(key):
            yield key, config[key], "none of it"
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        yield "init_lora_weights", config["init_lora_weights"], "weights of the model as they are"
    if not _is_number(config.get("lora_alpha")):
        yield "lora_alpha", config.get("lora_alpha"), "a number"
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        yield "alpha_pattern", patterns, "names and numbers"
        return
    for name, value in patterns.items():
        if not PLAIN_NAME.fullmatch(name) or not _is_number(value):
            yield f"alpha_pattern.{name}", value, "a number, for the end of a module's name"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < MOST_ALPHA  # not so where it is no number


def _alpha(config: Mapping[str, Any], module: str) -> float:
    """The alpha of a module: that of the first pattern which is its name or the end of it, or of all."""
    patterns = config.get("alpha_pattern") or {}
    ends = (value for end, value in patterns.items() if f".{module}".endswith(f".{end}"))
    return float(next(ends, config["lora_alpha"]))


def _config(
    model: ModelSpec, adapters: Adapters, alpha: float | None, modules: list[PeftModule]
) -> dict[str, object]:
    ends = targets(model, (module.name for module in modules))
    ranks = {ends[m.name]: m.written_rank for m in modules if m.written_rank != adapters.rank}
    scale, names = scale_of(adapters, alpha), names_of(model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": adapters.rank,
        "lora_alpha": scale * adapters.rank,
        "target_modules": sorted(set(ends.values())),
        "rank_pattern": ranks,
        "alpha_pattern": {end: scale * rank for end, rank in ranks.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(names.transposed),
        "use_rslora": False,
        "inference_mode": True,
    }


KEPT = "huggingface"
"""Where a run keeps config.json and the tokenizer's files of the folder that it began with."""

CONFIG = "config.json"
KEPT_FILES = (CONFIG, "generation_config.json", "special_tokens_map.json", "added_tokens.json")
KEPT_PATTERNS = ("tokenizer*.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


def check_folder(folder: Path, spec: ModelSpec) -> None:
    """Raises InputError where the folder's weights or its config.json are not of this model."""
    if (folder / CONFIG).exists():
        check_config(folder / CONFIG, spec)
    WeightFolder(folder, spec)


def check_config(file: Path, spec: ModelSpec) -> None:
    """Raises InputError with everything in which a config.json describes another model than the plan's."""
    own, theirs = _plain(spec), _plain(read_config_file(file))
    problems = [
        Problem(
            where=f"{file}: {name}",
            fault=f"is {theirs.get(name, 'absent')!r}, the plan's model has {own.get(name, 'absent')!r}.",
            fix="solve with --model and this folder",
        )
        for name in dict.fromkeys((*own, *theirs))
        if own.get(name, "absent") != theirs.get(name, "absent")
    ]
    if problems:
        raise InputError(*problems)


def _plain(spec: ModelSpec) -> dict[str, Any]:
    """Every fact of a model under its path. What training alone reads is left out: a plan may change it."""
    facts = encode(dataclasses.replace(spec, name="", sources=(), initializer_range=0.0, max_positions=1))
    found = dict(_flat(facts, ""))
    return {name: value for name, value in found.items() if ".routing." not in name}


def _flat(value: Any, prefix: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}".strip("."))]
    if isinstance(value, (list, tuple)):
        return [pair for place, item in enumerate(value) for pair in _flat(item, f"{prefix}.{place}")]
    return [(prefix, value)]


def keep_files(folder: Path, run_dir: Path) -> None:
    """Copies config.json and the tokenizer's files into the run, for its weights to be exported with."""
    kept = run_dir / KEPT
    kept.mkdir(exist_ok=True)
    for path in side_files(folder):
        shutil.copyfile(path, kept / path.name)


def side_files(folder: Path) -> list[Path]:
    """The files of a folder beside its weights that belong to the model."""
    named = [folder / name for name in KEPT_FILES]
    found = [path for pattern in KEPT_PATTERNS for path in sorted(folder.glob(pattern))]
    return [path for path in (*named, *found) if path.is_file()]


CORRECTION = ".correction"
"""Ends the names of what corrects a router's choice, which is no weight, and fp32 in any precision."""


class MergedWeights:
    """Reads whole parameters by our names. `base` is the folder that the run began with."""

    def __init__(self, checkpoint: Path, index: CheckpointIndex, plan: Plan, base: Path) -> None:
        """Raises InputError where the run trained no adapters, or beside other weights than `base` has."""
        adapters = plan.workload.adapters
        if adapters is None:
            fault = f"is given, but the run trained all weights (method {plan.workload.method})."
            raise InputError(Problem(where="--merge-adapters", fault=fault, fix="leave it out"))
        self._dtype = compute_dtype(plan.workload.precision)
        alpha = index.run.get("lora_alpha")
        self._scale = scale_of(adapters, None if alpha is None else float(alpha))
        self._base, self._adapters = WeightFolder(base, plan.model), read_adapters(checkpoint)
        self._shapes = {mapped.name: mapped.shape for mapped in self._base.map.parameters}
        frozen = (self._frozen(name) for name in self._shapes if not name.endswith(CORRECTION))
        saved = torch.zeros(3, dtype=torch.float64)
        load_checkpoint(checkpoint, index, {"executor": {"base": saved}})
        check_base(saved, sum((sums_of(weight) for weight in frozen), torch.zeros(3, dtype=torch.float64)))

    def __call__(self, name: str) -> Tensor:
        """One parameter, as it is or with its adapter, in fp32."""
        if name.endswith(CORRECTION):
            return self._read(name)
        weight, path = self._frozen(name).float(), name.removesuffix(".weight")
        if f"{path}.{A}" in self._adapters:
            weight += self._scale * self._adapters[f"{path}.{B}"] @ self._adapters[f"{path}.{A}"]
        return weight

    def _frozen(self, name: str) -> Tensor:
        """A parameter of the base in the compute precision."""
        return self._read(name).to(self._dtype)

    def _read(self, name: str) -> Tensor:
        weight = torch.empty(self._shapes[name])
        self._base.fill(name, weight)
        return weight


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and from which step."""

    folder: Path
    step: int
    dtype: str
    files: tuple[Path, ...]
    remarks: tuple[str, ...]


def export_run(
    run_dir: Path,
    folder: Path,
    *,
    config: Path | None,
    dtype: str | None,
    step: int | None,
    base: Path | None = None,
) -> Exported:
    """Writes the weights of a run's newest whole checkpoint, or that of `step`, to a new folder.

    `config` None is the one that the run began with (`--init-from`); `dtype` None is the config's own, or
    float32. `base` are the weights beside which a run trained adapters, which are merged into them. Raises
    InputError where there is none, or it describes another model.
    """
    plan = load_plan(run_dir / PLAN)
    spec = plan.model
    check_executed(spec, "export")
    path, remarks = _checkpoint(run_dir / CHECKPOINTS, step)
    index = load_index(path)
    source = config or run_dir / KEPT / CONFIG
    if not source.exists():
        fault = "is not there: the run began without a Hugging Face folder."
        raise InputError(Problem(where=str(source), fault=fault, fix="name a config.json with --config"))
    source = source / CONFIG if source.is_dir() else source
    check_config(source, spec)
    document = load_json_object(source)
    chosen = dtype or _own_dtype(document)
    files = write_weights(
        _reader(plan, path, index, base),
        spec,
        folder,
        config=_with_dtype(document, chosen),
        dtype=DTYPES[chosen],
    )
    for side in side_files(source.parent):
        if side.name != CONFIG:
            shutil.copyfile(side, folder / side.name)
    return Exported(folder, index.step, chosen, tuple(files), remarks)


def _reader(plan: Plan, path: Path, index: CheckpointIndex, base: Path | None) -> ReadParameter:
    """What reads one whole parameter of a run."""
    if base is not None:
        return MergedWeights(path, index, plan, base)
    if plan.workload.adapters is not None:
        raise InputError(
            Problem(
                where=str(path),
                fault="holds adapters alone, beside weights that were not trained.",
                fix="name their folder with --merge-adapters, or give the run's adapter folder to PEFT",
            )
        )
    return partial(_read, path, index)


def _checkpoint(folder: Path, step: int | None) -> tuple[Path, tuple[str, ...]]:
    """The checkpoint to export, verified, and why newer ones were passed over."""
    if step is None:
        found = find_checkpoint(folder)
        if found.path is None:
            fault = "holds no whole checkpoint." + "".join(f" {text}" for text in found.refused)
            raise InputError(Problem(where=str(folder), fault=fault))
        return found.path, found.refused
    saved = {load_index(path).step: path for path in committed_folders(folder)}
    if step not in saved:
        legal = ", ".join(map(str, sorted(saved))) or "none is saved"
        raise InputError(Problem(where="--step", fault=f"{step} is not saved in {folder}.", legal=legal))
    problems = verify(saved[step])
    if problems:
        raise InputError(*problems)
    return saved[step], ()


def _read(path: Path, index: CheckpointIndex, name: str) -> Tensor:
    """One whole parameter of a checkpoint."""
    key = f"model.{name}"
    stored = index.tensors.get(f"executor/{key}")
    if stored is None:
        raise InputError(Problem(where=str(path), fault=f"lacks the tensor {name}."))
    whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    load_checkpoint(path, index, {"executor": {key: whole}})
    return whole


def _own_dtype(config: dict[str, Any]) -> str:
    found = config.get("dtype") or config.get("torch_dtype")
    return found if found in DTYPES else "float32"


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}
