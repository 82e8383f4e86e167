"""A plan for its own runtime: how `plan train` is started on every node, or by a launcher as every rank."""

from __future__ import annotations

import json

from planner.export import artifact as facts
from planner.export import text_files as shell
from planner.export.artifact import ExportFile
from planner.foundation.decode import encode
from planner.foundation.frozen import replaced
from planner.strategy.plan import Plan, encode_plan

PLAN_FILE = "plan.json"
SCRIPT = "native.sh"
LEAST_GRACE_S = 300.0
"""Time to finish a step and to save in, at least."""


def plan_file(plan: Plan) -> ExportFile:
    """The plan itself, without what only reports read: its replay and its runners-up."""
    short = replaced(plan, timeline=(), rehearsal=None)
    document = encode_plan(short)
    if plan.solver is not None:
        document["alternatives"] = []
    return ExportFile(name=PLAN_FILE, text=json.dumps(encode(document), allow_nan=False) + "\n")


def grace_s(plan: Plan) -> float:
    """Seconds between being asked to end and being ended: two steps and a checkpoint, and room for both."""
    job = plan.estimate.job
    checkpoint_s = job.checkpoint_wait_s if job is not None and job.checkpoint_wait_s is not None else 0.0
    wanted_s = 2 * plan.estimate.step_time_interval_s[1] + 2 * checkpoint_s
    return max(LEAST_GRACE_S, 60.0 * -(-wanted_s // 60))


def train_command(plan: Plan) -> str:
    """`plan train` with what the plan says of checkpoints; goes on where the run folder holds one."""
    job = plan.estimate.job
    every = job.checkpoint_every if job is not None else None
    checkpoints = f" --checkpoint-every {every}" if every else ""
    return (
        f'plan train "$HERE/{PLAN_FILE}" --run-dir "$RUN_DIR"{checkpoints} '
        '${DATA:+--data "$DATA"} $RESUME ${EXTRA_ARGS:-}'
    )


def run_variables() -> str:
    """The run folder, which all nodes share, and whether it is gone on with."""
    return (
        'RUN_DIR="${RUN_DIR:-$HERE/run}"  # on storage that every node sees\n'
        'RESUME=""\n'
        'if compgen -G "$RUN_DIR/checkpoints/step-*/COMMIT" > /dev/null; then RESUME="--resume"; fi\n'
    )


def native_files(plan: Plan) -> tuple[ExportFile, ...]:
    """The plan and the script that runs it on one node of several, under torchrun."""
    text = "\n".join(
        [
            shell.head(facts.comment(["For `plan train`.", *facts.predictions(plan)])),
            'HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
            run_variables() + shell.node_variables(plan),
            "# torchrun passes SIGTERM on, and waits so many seconds for the step and the checkpoint.",
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={round(grace_s(plan))}",
            f'exec {shell.torchrun()} \\\n  --no-python {train_command(plan)} "$@"',
            "",
        ]
    )
    return (plan_file(plan), ExportFile(name=SCRIPT, text=text))
