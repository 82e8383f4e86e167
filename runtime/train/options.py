"""TrainOptions: what a run is told beside its plan."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.model.spec import ModelSpec
from planner.model.workload import Optimizer
from planner.strategy.plan import Plan
from runtime.train.data.prepare import DataOptions
from runtime.train.optimizer import OptimizerOptions

LEAST_DECAY_STEPS = 1000
"""A run without a token budget decays over at least this many steps, so that a short run is the start of
a longer one and can be continued exactly."""

ADAFACTOR_LR = 1e-2
"""Relative to a weight's own size, so the same for every model (arXiv 1804.04235, algorithm 6)."""
MUON_MOMENTUM = 0.95
"""Jordan 2024; arXiv 2502.16982."""


@frozen
class TrainOptions:
    """The options of `plan train`. None: chosen by `resolve`, or taken from the resumed checkpoint.

    `steps` counts from the beginning of training, not from the resumed step. `data_cache` is where
    tokenized data goes, for runs to share; None: the run's own folder. `init_from` is a folder of weights to
    begin with, `adapters_from` one of PEFT's adapters. `checkpoint_every` 0 saves at the end only.
    `sync_checkpoints` makes training wait until a checkpoint is published, not only copied. `compile` None
    compiles blocks on CUDA. `hang_timeout` is after how many seconds a rank that does not answer ends the
    run; None: by the plan's predicted times. `any_device` lets a plan run on other devices than it was made
    for. `document_mask` keeps attention within documents. `log` names experiment trackers beside
    metrics.jsonl. `hf_config` makes the modules Hugging Face Transformers', of this config. torch's profiler
    traces `profile_steps` steps. `lora_alpha` None is twice the rank of the plan's adapters.
    """

    steps: int
    run_dir: str
    data: DataOptions = DataOptions()
    data_cache: str | None = None
    resume: bool = False
    init_from: str | None = None
    adapters_from: str | None = None
    hf_config: str | None = None
    seed: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    sync_checkpoints: bool = False
    lr: float | None = None
    min_lr_ratio: float | None = None
    warmup: int | None = None
    decay_steps: int | None = None
    weight_decay: float | None = None
    clip: float | None = None
    lora_alpha: float | None = None
    compile: bool | None = None
    hang_timeout: float | None = None
    any_device: bool = False
    document_mask: bool = False
    log: tuple[str, ...] = ()
    profile_steps: int = 0
    memory_snapshot: bool = False


def default_lr(model: ModelSpec) -> float:
    """A learning rate for AdamW by model size: 0.003239 - 0.0001395 ln(N), at least 3e-5.

    N counts parameters without embeddings. Kaplan et al., "Scaling laws for neural language models",
    2020, equation D.1; the floor is where GPT-3 175B ended up (6e-5, Brown et al. 2020), halved.
    """
    params = max(1, model.params_total - model.params_embedding)
    return max(3e-5, 0.003239 - 0.0001395 * math.log(params))


def resolve(options: TrainOptions, plan: Plan, saved: OptimizerOptions | None) -> OptimizerOptions:
    """Every setting: as given, else as saved by the run that goes on, else by default.

    The defaults are a warm-up of 1 % of the decay but 10 to 2000 steps, a decay to a tenth over the
    tokens of the workload (else over max(steps, LEAST_DECAY_STEPS)), weight decay 0.1 and clipping at
    1.0, as in Brown et al. 2020 (GPT-3), appendix B.
    """
    base = saved or _defaults(options, plan)
    given: dict[str, Any] = {
        "learning_rate": options.lr,
        "min_lr_ratio": options.min_lr_ratio,
        "warmup_steps": options.warmup,
        "total_steps": options.decay_steps,
        "weight_decay": options.weight_decay,
        "clip_norm": options.clip,
    }
    return dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})


def _defaults(options: TrainOptions, plan: Plan) -> OptimizerOptions:
    tokens = plan.workload.tokens
    by_tokens = None if tokens is None else max(1, tokens // plan.workload.tokens_per_step)
    total_steps = options.decay_steps or by_tokens or max(options.steps, LEAST_DECAY_STEPS)
    kind = plan.workload.optimizer
    return OptimizerOptions(
        learning_rate=ADAFACTOR_LR if kind is Optimizer.ADAFACTOR else default_lr(plan.model),
        momentum=MUON_MOMENTUM if kind is Optimizer.MUON else 0.9,
        min_lr_ratio=0.1,
        warmup_steps=min(2000, max(10, total_steps // 100)),
        total_steps=total_steps,
        weight_decay=0.1,
        clip_norm=1.0,
    )


def check_options(options: TrainOptions) -> None:
    """Raises InputError with every option whose number makes no sense."""
    rules = [
        ("--steps", options.steps, options.steps >= 1, "1 or more"),
        ("--checkpoint-every", options.checkpoint_every, options.checkpoint_every >= 0, "0 or more"),
        ("--profile-steps", options.profile_steps, options.profile_steps >= 0, "0 or more"),
        ("--keep", options.keep, options.keep >= 2, "2 or more, so that a good one is always there"),
        ("--lr", options.lr, options.lr is None or 0 < options.lr < math.inf, "above 0"),
        ("--warmup", options.warmup, options.warmup is None or options.warmup >= 0, "0 or more"),
        (
            "--decay-steps",
            options.decay_steps,
            options.decay_steps is None or options.decay_steps >= 1,
            "1 or more",
        ),
        (
            "--min-lr-ratio",
            options.min_lr_ratio,
            options.min_lr_ratio is None or 0 <= options.min_lr_ratio <= 1,
            "0 to 1",
        ),
        (
            "--weight-decay",
            options.weight_decay,
            options.weight_decay is None or 0 <= options.weight_decay < math.inf,
            "0 or more",
        ),
        ("--lora-alpha", options.lora_alpha, options.lora_alpha is None or options.lora_alpha > 0, "above 0"),
        (
            "--hang-timeout",
            options.hang_timeout,
            options.hang_timeout is None or 0 < options.hang_timeout < math.inf,
            "above 0",
        ),
        ("--clip", options.clip, options.clip is None or options.clip > 0, "above 0"),
    ]
    problems = [
        Problem(where=flag, fault=f"{value} makes no sense.", legal=legal)
        for flag, value, good, legal in rules
        if not good
    ]
    if options.document_mask and options.hf_config is not None:
        fault = "is given with --backend transformers, whose models make their masks themselves."
        fix = "leave it out, or train with --backend native"
        problems.append(Problem(where="--document-mask", fault=fault, fix=fix))
    if problems:
        raise InputError(*problems)
