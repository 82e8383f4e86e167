"""A plan for Megatron-LM: a script that starts pretrain_gpt.py, and the same arguments as YAML."""

from __future__ import annotations

from typing import Any

from planner.export import artifact as facts
from planner.export import text_files as shell
from planner.export.artifact import Export, ExportFile
from planner.export.megatron import KEYS
from planner.export.settings import Recipe, Settings, settings_of, written
from planner.export.text_files import yaml_text
from planner.model.workload import Precision
from planner.strategy.engines.megatron import RELEASE
from planner.strategy.engines.megatron_model import ModelArguments
from planner.strategy.plan import Plan
from planner.strategy.strategy import Zero

SCRIPT = "megatron.sh"
DEFAULT_STEPS = 100
"""Steps of a run whose tokens the plan does not know; TRAIN_ITERS overrides."""


def export_megatron(plan: Plan) -> Export:
    """The script, its arguments as YAML, and what is left to Megatron-LM."""
    settings = settings_of(plan.strategy, plan.workload, (Recipe.FIRST,))
    parallel = written(KEYS, settings)
    model = ModelArguments(plan.model, plan.workload, settings.tp).flags
    files = (
        ExportFile(name=SCRIPT, text=_script(plan, settings, model, parallel)),
        ExportFile(name="megatron.yaml", text=_yaml(plan, settings, model, parallel)),
    )
    return Export(
        target="megatron",
        release=RELEASE,
        files=files,
        start=f"MEGATRON=/path/to/Megatron-LM ./{SCRIPT}",
        decides=(*_decides(plan, settings), *facts.node_order(plan)),
        yours=(
            "data and tokenizer: DATA_ARGS stands for made-up tokens (--mock-data) of its vocabulary",
            "learning rate and its decay (LR, MIN_LR), checkpoints (--save, --load in EXTRA_ARGS)",
            *facts.rotary(plan),
            *facts.priced_elsewhere(plan, "megatron"),
        ),
    )


def environment(settings: Settings) -> dict[str, tuple[str, str]]:
    """Variables that Megatron-LM asks for, each with its reason."""
    fsdp = settings.zero in (Zero.GRADIENTS, Zero.PARAMETERS)
    if fsdp:
        value, why = "32", "Megatron-FSDP asserts that it is not 1: gathers run beside products"
    else:
        value, why = "1", "asserted with tensor or context parallelism before Blackwell: order of kernels"
    return {
        "CUDA_DEVICE_MAX_CONNECTIONS": (value, why),
    }


def _decides(plan: Plan, settings: Settings) -> tuple[str, ...]:
    said = [
        "which parameters share a bucket of --overlap-grad-reduce, and Transformer Engine's kernels",
        "the layout of ranks: tensor, context, data, pipeline from the innermost, as the plan's",
    ]
    if settings.zero is Zero.OPTIMIZER:
        said.append(
            "gathered parameters are waited for: --overlap-param-gather is not asked for, as not priced"
        )
    if plan.model.experts and plan.workload.precision not in (Precision.BF16, Precision.FP8):
        said.append("experts run one after the other: grouped products are in bf16 alone")
    if plan.strategy.degrees.spreads_experts:
        said.append("gradients of experts are reduced over the ranks that expert parallelism leaves")
    return tuple(said)


def training_flags(plan: Plan) -> dict[str, Any]:
    """What makes the step that was priced, and is no choice of the plan."""
    return {
        "--attention-backend": "flash",
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
        "--no-create-attention-mask-in-dataloader": True,
        "--distributed-backend": "nccl",
        "--weight-decay": 0.1,
        "--clip-grad": 1.0,
        "--lr-decay-style": "cosine",
        "--eval-iters": 0,
        "--log-interval": 1,
        "--log-throughput": True,
        "--exit-signal-handler": True,
    }


def _script(plan: Plan, settings: Settings, model: dict[str, Any], parallel: dict[str, Any]) -> str:
    steps, vocab = steps_of(plan), max(1, plan.model.vocab - 1)
    exports = "".join(
        f"export {name}={value}  # {why}\n" for name, (value, why) in environment(settings).items()
    )
    return "\n".join(
        [
            shell.head(facts.comment([f"For {RELEASE}.", *facts.predictions(plan)])),
            'MEGATRON="${MEGATRON:?folder of Megatron-LM}"',
            exports + shell.node_variables(plan),
            shell.array("MODEL_ARGS", model),
            shell.array("PARALLEL_ARGS", parallel),
            shell.array("TRAINING_ARGS", training_flags(plan)),
            f'TRAINING_ARGS+=(--train-iters "${{TRAIN_ITERS:-{steps}}}" --lr "${{LR:-3e-4}}" '
            '--min-lr "${MIN_LR:-3e-5}")\n',
            "# The tokenizer without data adds a token: its vocabulary is one larger than said.\n"
            f'DATA_ARGS="${{DATA_ARGS:---mock-data --tokenizer-type NullTokenizer --vocab-size {vocab}}}"\n',
            f'exec {shell.torchrun()} \\\n  "$MEGATRON/pretrain_gpt.py" "${{MODEL_ARGS[@]}}" '
            '"${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" \\\n  $DATA_ARGS ${EXTRA_ARGS:-} "$@"',
            "",
        ]
    )


def _yaml(plan: Plan, settings: Settings, model: dict[str, Any], parallel: dict[str, Any]) -> str:
    document = {
        "ENV_VARS": {name: value for name, (value, _) in environment(settings).items()},
        "MODEL_ARGS": {**model, **parallel, **training_flags(plan), "--train-iters": steps_of(plan)},
    }
    return facts.comment([f"For {RELEASE}.", *facts.predictions(plan)]) + yaml_text(document)


def steps_of(plan: Plan) -> int:
    tokens = plan.workload.tokens
    return DEFAULT_STEPS if tokens is None else max(1, round(tokens / plan.workload.tokens_per_step))
