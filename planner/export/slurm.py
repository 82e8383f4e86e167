"""A plan as a batch script of Slurm: nodes, time, signals, and the ranks.

Options are those of sbatch(1) and srun(1) (slurm.schedmd.com/sbatch.html, srun.html): `--signal=B:TERM@S`
signals the batch shell S seconds before the limit, and srun passes a SIGTERM that it gets on to its tasks.
"""

from __future__ import annotations

from planner.export import artifact as facts
from planner.export import text_files as shell
from planner.export.artifact import Export, ExportFile
from planner.export.native import grace_s, run_variables, train_command
from planner.export.scheduled import Launched, job_name, nodes, run_s
from planner.strategy.plan import Plan

FILE = "plan.sbatch"
RESUMES = "RESUMES"
"""Variable by which the user says that an engine goes on from its own checkpoints."""


def export_slurm(plan: Plan) -> Export:
    """The batch script, and the files of the plan's engine."""
    launched = Launched(plan)
    limit_s = run_s(plan)
    yours = [
        *launched.yours,
        "partition and account (sbatch --partition --account); a shorter --time where the partition wants it",
    ]
    if not launched.native:
        yours.append(
            f"{RESUMES}=1 where the engine saves checkpoints and loads the newest: a job cut short is then "
            "queued again, whatever the launcher's exit code"
        )
    if limit_s is None:
        yours.append("--time: the plan's tokens are not known, and so neither is how long it runs")
    return Export(
        target="slurm",
        release="Slurm 23.11 and later",
        files=(ExportFile(name=FILE, text=_script(plan, launched, limit_s)), *launched.files),
        start=f"sbatch {FILE}",
        decides=(
            *launched.decides,
            "which nodes: neighbours in the network only where the site's topology plugin says so",
        ),
        yours=tuple(yours),
    )


def _script(plan: Plan, launched: Launched, limit_s: float | None) -> str:
    gpus, cpu = plan.cluster.devices_per_node, plan.cluster.groups[0].device.name == "cpu"
    tasks = gpus if launched.native else 1
    options = {
        "job-name": job_name(plan),
        "nodes": nodes(plan),
        "ntasks-per-node": tasks,
        **({} if cpu else {"gpus-per-node": gpus}),
        "exclusive": None,
        **({} if limit_s is None else {"time": _time(limit_s)}),
        "signal": f"B:TERM@{round(grace_s(plan))}",
        "requeue": None,
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    header = "".join(
        f"#SBATCH --{name}{'' if value is None else f'={value}'}\n" for name, value in options.items()
    )
    comments = facts.comment([*facts.predictions(plan), *_why(launched, limit_s)])
    return "\n".join(
        [
            shell.head(header + comments),
            # Slurm runs a copy of the script from its spool folder.
            'HERE="${HERE:-$SLURM_SUBMIT_DIR}"',
            'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            f"MASTER_PORT=$(({shell.PORT} + SLURM_JOB_ID % 1000))",
            "export HERE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=1 "
            f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={round(grace_s(plan))}",
            _run(plan) if launched.native else _run_script(launched),
            _WAIT,
        ]
    )


def _why(launched: Launched, limit_s: float | None) -> list[str]:
    """What the time and the signal are."""
    told = (
        []
        if limit_s is None
        else ["--time is the run predicted at the slow end of its interval, and its start."]
    )
    if launched.native:
        told.append(
            "SIGTERM comes before the limit: the step is finished, a checkpoint saved, the job queued again."
        )
    else:
        told.append(
            f"SIGTERM comes before the limit. {RESUMES}=1 says that {launched.engine} saves and goes on: "
            "then the job is queued again."
        )
    return told


def _time(limit_s: float) -> str:
    """Days-hours:minutes:seconds."""
    minutes, seconds = divmod(round(limit_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"


def _run(plan: Plan) -> str:
    """Every task is a rank: signals reach it without a launcher in between, which would end it sooner."""
    return (
        run_variables()
        + "export RUN_DIR RESUME\n"
        + "\n# Each task is a rank of the plan.\n"
        + "srun --kill-on-bad-exit=1 bash -c '\n"
        + "  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID\n"
        + f"  exec {train_command(plan)}\n"
        + "' &\nstep=$!"
    )


def _run_script(launched: Launched) -> str:
    return (
        "\n# One launcher a node.\n"
        "srun --kill-on-bad-exit=1 bash -c '\n"
        f'  export NODE_RANK=$SLURM_NODEID\n  exec bash "$HERE/{launched.script}"\n'
        "' &\nstep=$!"
    )


_WAIT = """\
interrupted=""
trap 'interrupted=1; kill -TERM "$step"' TERM

# A signal ends the first wait; the second is for the checkpoint.
code=0; wait "$step" || code=$?
if [[ -n "$interrupted" ]]; then code=0; wait "$step" || code=$?; fi
if [[ -n "$interrupted" && ( "$code" -eq 0 || -n "${RESUMES:-}" ) ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
