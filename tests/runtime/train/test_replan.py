"""A run that loses half its ranks goes on by a new plan as if nothing had been, and grows back."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.commands.shared.options import ProblemInputs
from planner.commands.shared.problem import asked_of, held_to_trainer
from planner.hardware.cluster_text import parse_cluster
from planner.job.problem import NO_OVERHEADS
from planner.model.spec import Block, ModelSpec, Segment
from planner.model.workload import Precision, Workload
from planner.search.solve import SolveOptions, solve
from planner.strategy.fixed_choices import parse_fixed_choices
from planner.strategy.plan import Plan, load_plan, save_plan
from planner.strategy.strategy import Degrees
from runtime.train.data.documents import shipped_corpus
from runtime.train.data.prepare import DataOptions
from runtime.train.options import TrainOptions
from runtime.train.train import run_training
from tests.plans import make_plan, tiny_deepseek_experts, tiny_llama, tiny_mla
from tests.runtime.processes import children, exit_code, forked, wait_for

STEPS = 1000
"""Of the whole run; the schedule of its learning rate is that of a run of so many."""
EVERY = 3
SEEN = 2 * EVERY + 1
"""Steps after which a run is killed at the earliest: two checkpoints, of which one is whole for sure."""
MORE = 3
USD_PER_HOUR = {4: 3600.0, 2: 1800.0}
TOLERANCE = 1e-5
"""Relative. Another layout adds in another order."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((shipped_corpus() / "pride_and_prejudice.txt").read_text()[:20_000])
    return str(file)


def with_price(plan: Plan) -> Plan:
    """The plan on a cluster that costs a dollar a second for four ranks, half of it for two."""
    price = USD_PER_HOUR[plan.cluster.devices]
    return dataclasses.replace(plan, cluster=dataclasses.replace(plan.cluster, price_usd_per_hour=price))


def solved(model: ModelSpec, *fixed: str) -> Plan:
    """The plan of a model on four processes of this machine."""
    cluster = parse_cluster("local:4")
    workload = Workload(seq=16, batch=8, precision=Precision.FP32, tokens=STEPS * 16 * 8)
    inputs = ProblemInputs(model, workload, cluster, None, None, NO_OVERHEADS)
    problem = held_to_trainer(asked_of(inputs), "").problem
    plan = solve(problem, SolveOptions(pins=parse_fixed_choices(fixed, cluster), reproducible=True))
    return with_price(plan)


def options(text: str, run_dir: Path, **given: Any) -> TrainOptions:
    data = DataOptions(data=(text,), tokenizer="byte")
    return TrainOptions(steps=STEPS, run_dir=str(run_dir), data=data, lr=1e-2, warmup=2, seed=5, **given)


def killed(plan: Plan, text: str, run_dir: Path, victim: str) -> int:
    """Begins a run and kills it, or one of its ranks, with SIGKILL; the exit code of its process."""
    begin = options(text, run_dir, checkpoint_every=EVERY)
    run_dir.mkdir()
    pid = forked(lambda: run_training(plan, begin, shown=False) and None, run_dir / "fault.txt")
    wait_for(lambda: len(lines(run_dir)) >= SEEN)
    os.kill(pid if victim == "parent" else children(pid)[1], signal.SIGKILL)
    return exit_code(pid)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each step; a last line that was not finished is left out."""
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def call(*words: str) -> Any:
    """The JSON document of a command that ends well."""
    result = CliRunner().invoke(cli, [*words, "--json"], prog_name="plan")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def replanned(run_dir: Path, cluster: str, *more: str) -> dict[str, Any]:
    """The answer of `plan replan`, whose plan gets its price."""
    before = contents(run_dir)
    new = run_dir.with_name(f"{run_dir.name}-{cluster.replace(':', '')}.json")
    answer: dict[str, Any] = call(
        "replan", str(run_dir), "--cluster", cluster, "-o", str(new), "--reproducible", *more
    )
    assert contents(run_dir) == before
    save_plan(with_price(load_plan(new)), new)
    return answer


def contents(run_dir: Path) -> dict[str, bytes]:
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def go_on(answer: dict[str, Any], steps: int) -> Any:
    """The summary of the command that an answer names, up to so many steps."""
    words = answer["arguments"]
    assert words[:2] == ["plan", "train"] and words[words.index("--steps") + 1] == str(STEPS)
    words[words.index("--steps") + 1] = str(steps)
    return call(*words[1:])


def same_course(run_dir: Path, straight: Path, steps: int) -> None:
    """Every step once, and each as in a run that nothing happened to."""
    found, wanted = lines(run_dir), lines(straight)
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    for line, want in zip(found, wanted, strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=TOLERANCE), line["step"]
        assert line["lr"] == want["lr"]
    assert len({want["loss"] for want in wanted}) == steps


def run_straight(model: ModelSpec, text: str, run_dir: Path, steps: int) -> None:
    """The same run by one process, without an interruption, which ends after `steps`."""
    whole = options(text, run_dir, decay_steps=STEPS)
    alone = make_plan(model, Degrees(micro_batch=8))
    run_training(alone, dataclasses.replace(whole, steps=steps), shown=False)


def test_a_killed_run_shrinks_and_grows_and_is_the_run_that_was_not(text: str, tmp_path: Path) -> None:
    model = tiny_llama(vocab=258)
    plan, run_dir = solved(model, "tp=2", "dp=2", "zero=3"), tmp_path / "run"
    assert killed(plan, text, run_dir, "parent") == -signal.SIGKILL
    done = len(lines(run_dir))
    first = replanned(run_dir, "local:2")
    step = first["checkpoint"]["step"]
    assert (step % EVERY, first["checkpoint"]["world"], first["plan"]["cluster"]["name"]) == (0, 4, "local:2")
    assert EVERY <= step <= done == first["run"]["logged_steps"]
    assert first["left"]["steps"] == STEPS - step and first["plan"]["workload"]["tokens"] == STEPS * 128
    spent = first["run"]["spent_usd"]
    assert spent == lines(run_dir)[-1]["cost_usd"] == pytest.approx(first["run"]["spent_s"])

    summary = go_on(first, step + MORE)
    assert (summary["first_step"], summary["last_step"], summary["world"]) == (step + 1, step + MORE, 2)
    own_s = summary["wall_s"] - first["run"]["spent_s"]
    assert summary["cost_usd"] == pytest.approx(spent + own_s / 2)
    steps_s = [each.estimate.step_time_s for each in (plan, load_plan(run_dir / "plan.json"))]
    assert summary["predicted_cost_usd"] == pytest.approx(step * steps_s[0] + MORE * steps_s[1] / 2)
    assert load_plan(run_dir / "earlier" / f"step-{step:08d}" / "plan.json") == plan

    second = replanned(run_dir, "local:4", "--steps", str(STEPS), "--fix", "pp=2")
    assert second["checkpoint"]["step"] == step + MORE and second["checkpoint"]["world"] == 2
    assert f"Steps 1 to {step} ran by {plan.strategy.degrees.label()}" in " ".join(second["remarks"])
    again = go_on(second, step + 2 * MORE)
    assert again["world"] == 4 and again["cost_usd"] > summary["cost_usd"]
    run_straight(model, text, tmp_path / "straight", step + 2 * MORE)
    same_course(run_dir, tmp_path / "straight", step + 2 * MORE)
    dollars = call("report", str(run_dir))["dollars"]
    assert (dollars["steps"], dollars["spent_usd"]) == (step + 2 * MORE, again["cost_usd"])
    assert dollars["predicted_usd"] == again["predicted_cost_usd"]


def latent_experts() -> ModelSpec:
    """Experts behind DeepSeek's routing and its latent attention."""
    experts, latent = tiny_deepseek_experts(), tiny_mla()
    (own,), (other,) = experts.segments, latent.segments
    assert isinstance(own.block, Block) and isinstance(other.block, Block)
    block = dataclasses.replace(own.block, mixer=other.block.mixer)
    segments = (Segment(block=block, count=own.count),)
    return dataclasses.replace(latent, name="tiny-latent-experts", vocab=258, segments=segments)


def test_a_run_of_experts_that_lost_a_rank_goes_on_with_two(text: str, tmp_path: Path) -> None:
    model = latent_experts()
    plan, run_dir = solved(model, "ep=2", "dp=4"), tmp_path / "run"
    assert killed(plan, text, run_dir, "rank") == 4
    assert "was killed by SIGKILL" in (run_dir / "fault.txt").read_text()
    answer = replanned(run_dir, "local:2", "--fix", "ep=2")
    step = answer["checkpoint"]["step"]
    assert go_on(answer, step + MORE)["world"] == 2
    run_straight(model, text, tmp_path / "straight", step + MORE)
    same_course(run_dir, tmp_path / "straight", step + MORE)
