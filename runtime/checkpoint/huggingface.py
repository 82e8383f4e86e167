"""Hugging Face folders and PEFT adapters at both ends of a run: what it begins with, and its exports.

A run may begin with the weights of a Hugging Face folder (`check_folder`) and with PEFT adapters
(`AdapterFolder`). Its checkpoints are exported as a Hugging Face folder (`export_run`) or as adapters
(`export_adapters`). Exported weights of a LoRA run include the adapters: W + s B A where a projection has an
adapter, W elsewhere. W is taken in the compute precision, as the run used it; the sum is in fp32.

Adapter files are adapter_model.safetensors and adapter_config.json. Their keys are those of peft's LoRA on a
Hugging Face model: base_model.model. + module name + .lora_A.weight [r, in] or .lora_B.weight [out, r] (peft,
utils/save_and_load.py). The scale s is alpha / r, or alpha / sqrt(r) with use_rslora; rank_pattern and
alpha_pattern override r and alpha for modules by the ends of their names (peft, tuners/lora/config.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
from runtime.checkpoint.store import (
    CheckpointIndex,
    Value,
    committed_folders,
    differing,
    find_checkpoint,
    flatten,
    load_index,
    verify,
)
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

KEPT_FOLDER = "huggingface"
"""Folder of a run with config.json and the tokenizer's files of the folder that it began with."""
CONFIG = "config.json"
KEPT_FILES = (CONFIG, "generation_config.json", "special_tokens_map.json", "added_tokens.json")
KEPT_PATTERNS = ("tokenizer*.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
EXECUTOR = "executor/"
MODEL = f"{EXECUTOR}model."
"""Prefix of the names of weights in a run's checkpoints (runtime.train.session)."""
CORRECTION = ".correction"
"""Suffix of a router's bias, which is not a weight and is fp32 in any precision."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
PEFT_HALVES = {A: "lora_A", B: "lora_B"}
UNSUPPORTED_SETTINGS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "modules_to_save"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "target_parameters"),
)
"""PEFT settings under which adapters compute something else, or other parameters are trained too."""
SUPPORTED_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the model's own weights unchanged."""
MISREAD_BY_PEFT = (
    "peft 0.21 does not find the adapters of gate_proj, up_proj and down_proj in dense layers of a model "
    "with experts: it looks for them in the experts. Merge them (plan export-weights --merge-adapters)"
)
"""Source: peft, utils/transformers_weight_conversion.py, `_convert_peft_config_moe`; with transformers 5."""
MAX_ALPHA = 1e9
LITERAL_NAME = re.compile(r"[\w.]+")
"""A pattern of alpha_pattern that is a plain name. A regular expression could take forever to match."""


def check_folder(folder: Path, spec: ModelSpec) -> None:
    """Raise InputError if the folder's weights or its config.json describe another model."""
    if (folder / CONFIG).exists():
        check_config(folder / CONFIG, spec)
    WeightFolder(folder, spec)


def check_config(file: Path, spec: ModelSpec) -> None:
    """Raise InputError with every fact in which a config.json describes another model than the plan's."""
    problems = [
        Problem(
            where=f"{file}: {name}",
            fault=f"is {theirs}, the plan's model has {own}.",
            fix="solve with --model and this folder",
        )
        for name, own, theirs in differing(_model_facts(spec), _model_facts(read_config_file(file)))
    ]
    if problems:
        raise InputError(*problems)


def _model_facts(spec: ModelSpec) -> dict[str, Value]:
    """Every fact of a model by path, but for those that only training reads: a plan may change these."""
    facts = encode(dataclasses.replace(spec, name="", sources=(), initializer_range=0.0, max_positions=1))
    return {name: value for name, value in flatten(facts).items() if ".routing." not in name}


def keep_files(folder: Path, run_dir: Path) -> None:
    """Copy config.json and the tokenizer's files into the run's folder, for exports of its weights."""
    kept = run_dir / KEPT_FOLDER
    kept.mkdir(exist_ok=True)
    for path in _model_files(folder):
        shutil.copyfile(path, kept / path.name)


def _model_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder that belong to the model but hold no weights."""
    named = [folder / name for name in KEPT_FILES]
    found = [path for pattern in KEPT_PATTERNS for path in sorted(folder.glob(pattern))]
    return [path for path in (*named, *found) if path.is_file()]


def _read_tensor(path: Path, index: CheckpointIndex, name: str) -> Tensor:
    """Read a whole tensor of a checkpoint from its boxes, in one process."""
    stored = index.tensors.get(name)
    if stored is None:
        raise InputError.at(path, f"lacks the tensor {name.removeprefix(MODEL)}.")
    whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    for chunk in stored.chunks:
        with safe_open(path / chunk.file, framework="pt") as file:
            box = tuple(slice(o, o + s) for o, s in zip(chunk.offset, chunk.shape, strict=True))
            whole[box] = file.get_tensor(f"{name}@{chunk.key}")
    return whole


@dataclass(frozen=True, slots=True)
class ExportedWeights:
    """The folder and files of an export, its step and number format, and why newer steps were not used."""

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
) -> ExportedWeights:
    """Write the weights of a run to a new Hugging Face folder.

    `step` None takes the newest whole checkpoint, `config` None the config.json that the run began with
    (`--init-from`), `dtype` None the config's own number format or float32. `base` is the folder of weights
    that a run's adapters belong to; the adapters are merged into them. Raises InputError if the checkpoint
    or the config is missing, or the config describes another model.
    """
    plan = load_plan(run_dir / PLAN)
    spec = plan.model
    check_executed(spec, "export")
    path, remarks = _choose_checkpoint(run_dir / CHECKPOINTS, step)
    index = load_index(path)
    source = config or run_dir / KEPT_FOLDER / CONFIG
    if not source.exists():
        raise InputError.at(
            source,
            "does not exist: the run did not begin with a Hugging Face folder.",
            fix="name a config.json with --config",
        )
    source = source / CONFIG if source.is_dir() else source
    check_config(source, spec)
    document = load_json_object(source)
    if dtype is None:
        own = document.get("dtype") or document.get("torch_dtype")
        dtype = own if own in DTYPES else "float32"
    key = "torch_dtype" if "torch_dtype" in document else "dtype"
    files = write_weights(
        _parameter_reader(plan, path, index, base),
        spec,
        folder,
        config={**document, key: dtype},
        dtype=DTYPES[dtype],
    )
    for file in _model_files(source.parent):
        if file.name != CONFIG:
            shutil.copyfile(file, folder / file.name)
    return ExportedWeights(folder, index.step, dtype, tuple(files), remarks)


def _choose_checkpoint(folder: Path, step: int | None) -> tuple[Path, tuple[str, ...]]:
    """The verified checkpoint to export, and the faults of newer ones."""
    if step is None:
        found = find_checkpoint(folder)
        if found.path is None:
            raise InputError.at(folder, " ".join(("holds no whole checkpoint.", *found.refused)))
        return found.path, found.refused
    saved = {load_index(path).step: path for path in committed_folders(folder)}
    if step not in saved:
        legal = ", ".join(map(str, sorted(saved))) or "none is saved"
        raise InputError.at("--step", f"{step} is not saved in {folder}.", legal=legal)
    problems = verify(saved[step])
    if problems:
        raise InputError(*problems)
    return saved[step], ()


def _parameter_reader(plan: Plan, path: Path, index: CheckpointIndex, base: Path | None) -> ReadParameter:
    """The function that reads one whole parameter of a run by our name."""
    if base is not None:
        return MergedWeights(path, index, plan, base)
    if plan.workload.adapters is not None:
        raise InputError.at(
            path,
            "holds only adapters: the weights that they belong to were not trained.",
            fix="name their folder with --merge-adapters, or give the run's adapter folder to PEFT",
        )
    return lambda name: _read_tensor(path, index, f"{MODEL}{name}")


class MergedWeights:
    """Reads whole parameters of a LoRA run by our names, with the adapters merged into the base weights."""

    def __init__(self, checkpoint: Path, index: CheckpointIndex, plan: Plan, base: Path) -> None:
        """Raises InputError if the run trained no adapters, or trained them on other weights than `base`."""
        adapters = plan.workload.adapters
        if adapters is None:
            raise InputError.at(
                "--merge-adapters",
                f"is given, but the run trained all weights (method {plan.workload.method}).",
                fix="leave it out",
            )
        self._dtype = compute_dtype(plan.workload.precision)
        alpha = index.run.get("lora_alpha")
        self._scale = scale_of(adapters, None if alpha is None else float(alpha))
        self._base, self._adapters = WeightFolder(base, plan.model), read_adapters(checkpoint)
        self._shapes = {mapped.name: mapped.shape for mapped in self._base.map.parameters}
        frozen = (self._frozen(name) for name in self._shapes if not name.endswith(CORRECTION))
        saved = _read_tensor(checkpoint, index, f"{EXECUTOR}base")
        check_base(saved, sum((sums_of(weight) for weight in frozen), torch.zeros(3, dtype=torch.float64)))

    def __call__(self, name: str) -> Tensor:
        """One parameter in fp32."""
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


def read_adapters(checkpoint: Path) -> dict[str, Tensor]:
    """Read the A and B matrices of all adapters of a checkpoint, by our names."""
    index = load_index(checkpoint)
    names = [n for n in index.tensors if n.startswith(MODEL) and n.rsplit(".", 1)[1] in PEFT_HALVES]
    return {name.removeprefix(MODEL): _read_tensor(checkpoint, index, name) for name in names}


def export_adapters(checkpoint: Path, plan: Plan, folder: Path, *, alpha: float | None) -> str:
    """Write the adapters of a committed checkpoint as PEFT files to `folder`, and describe the result.

    Only one process calls it. Families whose modules have no names in Hugging Face files are not written.
    """
    adapters = plan.workload.adapters
    assert adapters is not None
    try:
        write_adapters(read_adapters(checkpoint), plan.model, adapters, folder, alpha=alpha)
    except InputError as error:
        return f"no adapters for PEFT: {error}"
    dense = set(module_names(plan.model)) & set(MLP_MODULES)
    misread = bool(plan.model.experts) and any(adapts(adapters.modules, name) for name in dense)
    return f"adapters for PEFT are in {folder}" + (f"; {MISREAD_BY_PEFT}" if misread else "")


def write_adapters(
    halves: Mapping[str, Tensor], model: ModelSpec, adapters: Adapters, folder: Path, *, alpha: float | None
) -> None:
    """Write adapters, whose whole A and B matrices are given by our names, as PEFT files.

    Raises InputError for a family whose modules have no names in Hugging Face files.
    """
    modules, tensors = peft_modules(model, adapters), {}
    for module in modules:
        members = {path: (halves[f"{path}.{A}"], halves[f"{path}.{B}"]) for path, _ in module.members}
        for half, whole in zip(PEFT_HALVES, module.join(members), strict=True):
            tensors[_peft_key(module.name, half)] = whole.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = _adapter_config(model, adapters, alpha, modules)
    write_atomic(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def _peft_key(module: str, half: str) -> str:
    """PEFT's key for the A or B matrix of the adapter of a module of the Hugging Face model."""
    return f"{PEFT_PREFIX}{module}.{PEFT_HALVES[half]}.weight"


def _adapter_config(
    model: ModelSpec, adapters: Adapters, alpha: float | None, modules: list[PeftModule]
) -> dict[str, object]:
    ends = targets(model, (module.name for module in modules))
    ranks = {ends[m.name]: m.written_rank for m in modules if m.written_rank != adapters.rank}
    scale = scale_of(adapters, alpha)
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
        "fan_in_fan_out": bool(names_of(model).transposed),
        "use_rslora": False,
        "inference_mode": True,
    }


class AdapterFolder:
    """PEFT files that a run takes its first adapters from; each rank reads only its own slices."""

    def __init__(self, folder: Path, plan: Plan, *, alpha: float | None) -> None:
        """Raises InputError with everything in which the folder's adapters differ from the plan's."""
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
            for key, found, legal in _unsupported(config)
        ]
        if problems:
            raise InputError(*problems)
        self._file = open_file(folder / ADAPTER_WEIGHTS)
        self._ranks = self._check_tensors()
        self._check_scales(config, scale_of(adapters, alpha), adapters.rank)
        self._check_fused_modules()

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the A and B matrices among a rank's weights, which are given by our names."""
        with torch.no_grad():
            for name, tensor in weights:
                path, half = name.rsplit(".", 1)
                if half not in PEFT_HALVES:
                    continue
                local, box = local_box(tensor)
                module = self._of_path[path]
                stored, rank = self._slice(module, half), self._ranks[module.name]
                if half == A:
                    local.copy_(stored[_slices(module.box_of_a(path, box, rank))])
                else:
                    for rows, part in module.boxes_of_b(path, box, rank):
                        local[rows].copy_(stored[_slices(part)])

    def _slice(self, module: PeftModule, half: str) -> Any:
        return self._file.get_slice(_peft_key(module.name, half))

    def _check_tensors(self) -> dict[str, int]:
        """The rank in the file of each module's adapter, once all names and shapes are as expected."""
        keys: Iterable[str] = self._file.keys()
        found = {key: list(self._file.get_slice(key).get_shape()) for key in keys}
        expected: dict[str, list[int]] = {}
        ranks = {}
        for module in self._modules:
            key_a, key_b = (_peft_key(module.name, half) for half in PEFT_HALVES)
            outputs, inputs = module.shape
            legal = {module.rank, module.written_rank}
            rank = next((r for r in legal if found.get(key_a) == [r, inputs]), module.rank)
            expected |= {key_a: [rank, inputs], key_b: [outputs, rank]}
            ranks[module.name] = rank
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if wrong:
            first = wrong[0]
            example = f"{first} is {found.get(first, 'missing')}, the model has {expected.get(first, 'none')}"
            raise InputError.at(
                self.folder / ADAPTER_WEIGHTS,
                f"has other tensors than the run's adapters: {example} ({len(wrong)} differ).",
                fix=self._flags_for(found),
            )
        return ranks

    def _flags_for(self, found: Mapping[str, list[int]]) -> str:
        """The flags that solve a plan with the adapters of the file."""
        end = f".{PEFT_HALVES[A]}.weight"
        ranks = {key: shape[0] for key, shape in found.items() if key.endswith(end) and shape}
        modules = (key.removeprefix(PEFT_PREFIX).removesuffix(end) for key in ranks)
        names = named_modules(self._model, modules)
        return f"solve with {_flags(min(ranks.values()), names)}" if names else ""

    def _check_scales(self, config: Mapping[str, Any], scale: float, rank: int) -> None:
        power = 0.5 if config.get("use_rslora") else 1.0
        scales = {m.name: _alpha(config, m.name) / self._ranks[m.name] ** power for m in self._modules}
        others = {name: each for name, each in scales.items() if not math.isclose(each, scale, rel_tol=1e-6)}
        if others:
            name, each = next(iter(others.items()))
            same = len(set(scales.values())) == 1
            raise InputError.at(
                f"{self.folder / ADAPTER_CONFIG}: lora_alpha",
                f"scales the adapter of {name} by {each:g}, the run scales its adapters by {scale:g}.",
                fix=f"give --lora-alpha {each * rank:g}" if same else "use adapters that share one scale",
            )

    def _check_fused_modules(self) -> None:
        """Check that a fused module's adapter adds nothing to projections that have no adapter in the run."""
        for module in self._modules:
            if module.fused and bool(module.left_over(self._slice(module, B)[:]).any()):
                members = ", ".join(path for path, _ in module.members)
                names = named_modules(self._model, self._ranks)
                raise InputError.at(
                    self.folder / ADAPTER_WEIGHTS,
                    f"its adapter of {module.name} changes more than {members}, or has another rank than "
                    f"{module.rank} for each.",
                    fix=f"solve with {_flags(self._ranks[module.name], names)}",
                )


def _flags(rank: int, names: list[str]) -> str:
    return f"--lora-rank {rank} --lora-modules {','.join(names)}"


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(begin, end) for begin, end in box)


def _unsupported(config: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """List the settings under which adapters differ from a run's: key, value, legal values."""
    if config.get("peft_type") != "LORA":
        yield "peft_type", config.get("peft_type"), "'LORA'"
    if config.get("bias", "none") != "none":
        yield "bias", config["bias"], "'none'"
    for key in UNSUPPORTED_SETTINGS:
        if config.get(key):
            yield key, config[key], "it to be unset"
    if config.get("init_lora_weights", True) not in SUPPORTED_INITS:
        yield "init_lora_weights", config["init_lora_weights"], "unchanged weights of the model"
    if not _is_number(config.get("lora_alpha")):
        yield "lora_alpha", config.get("lora_alpha"), "a number"
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        yield "alpha_pattern", patterns, "names and numbers"
        return
    for name, value in patterns.items():
        if not LITERAL_NAME.fullmatch(name) or not _is_number(value):
            yield f"alpha_pattern.{name}", value, "a number, for the end of a module's name"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < MAX_ALPHA  # false for NaN


def _alpha(config: Mapping[str, Any], module: str) -> float:
    """The alpha of a module: of the first pattern that is the end of its name, else that of all modules."""
    patterns = config.get("alpha_pattern") or {}
    ends = (value for end, value in patterns.items() if f".{module}".endswith(f".{end}"))
    return float(next(ends, config["lora_alpha"]))
