"""`plan size`: the smallest and the cheapest cluster, what a given one can do, what wrong input is told."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from planner.commands.hardware.sizing_options import CLOSE, read_batch
from planner.commands.hardware.sizing_text import days_text, short_money
from planner.foundation.errors import InputError
from planner.foundation.units import DAY_S, parse_count
from planner.hardware.catalog import load_model
from planner.hardware.cluster_text import parse_cluster
from planner.job.objective import Goal, Minimise
from planner.search.greedy_plan import Scout, Shared
from planner.sizing import floors
from planner.sizing.ability import SEQ_PART, ability_of
from planner.sizing.comparison import Answers, Option, Standing, answers_of
from planner.sizing.floors import RULED_OUT, between, ladder
from planner.sizing.offers import Wanted, find_offers
from planner.sizing.scaling import load_laws, optimal_tokens, recommended
from planner.strategy.fixed_choices import FixedChoices
from tests.planner.catalog_problems import problem as catalog_problem
from tests.sizing_cases import BILLION, MARKET, compared, document, request, run

H100, A100, B200 = "p5.48xlarge", "p4d.24xlarge", "p6-b200.48xlarge"
LINE = ("size", "--model", "tinyllama-1.1b", "--seq", "2048", "--batch", "256", "--tokens", "10B")
ON_H100 = ("--instance", H100)


def usd(option: Option | None) -> float:
    return float("inf") if option is None or option.cost_usd is None else option.cost_usd


def sized(model: str, *names: str, days: float, **more: Any) -> Answers:
    goal = Goal(minimise=Minimise.COST, deadline_s=days * DAY_S)
    return answers_of(compared(request(model, *names, goal=goal, least=True, **more)))


CASES = [
    ("tinyllama-1.1b", (H100, A100), 2048, 256),
    ("llama-3-8b", (H100,), 8192, 512),
    ("mixtral-8x7b", (H100,), 4096, 512),
    ("llama-3-70b", (B200,), 8192, 480),
]
DAYS = (5, 12, 100, 130, 180, 260, 400, 4000)


@pytest.mark.parametrize(("model", "names", "seq", "batch"), CASES)
def test_a_later_deadline_is_not_dearer_and_needs_no_more_devices(
    model: str, names: tuple[str, ...], seq: int, batch: int
) -> None:
    each = [sized(model, *names, days=days, seq=seq, batch=batch, tokens=1000 * BILLION) for days in DAYS]
    for days, found in zip(DAYS, each, strict=True):
        for option in (found.smallest, found.cheapest, found.soonest):
            assert option is None or option.days <= days
    assert any(found.cheapest for found in each)
    for earlier, later in itertools.combinations(each, 2):
        assert usd(later.cheapest) <= usd(earlier.cheapest)
        if earlier.smallest is not None:
            assert later.smallest is not None and later.smallest.devices <= earlier.smallest.devices


@pytest.mark.parametrize(("model", "names", "seq", "batch"), CASES[:3])
def test_over_the_same_counts_a_later_deadline_is_never_dearer(
    model: str, names: tuple[str, ...], seq: int, batch: int
) -> None:
    each = [
        usd(
            sized(
                model, *names, days=d, seq=seq, batch=batch, tokens=1000 * BILLION, counts=(1, 4, 16)
            ).cheapest
        )
        for d in DAYS
    ]
    assert each == sorted(each, reverse=True) and each[-1] < float("inf")


def test_a_larger_budget_is_never_slower() -> None:
    days = []
    for budget in (10_000, 37_000, 40_000, 100_000, 200_000, 1e6):
        goal = Goal(minimise=Minimise.TIME, budget_usd=budget)
        asked = request("llama-3-8b", H100, seq=8192, batch=512, tokens=1000 * BILLION, goal=goal)
        soonest = answers_of(compared(asked)).soonest
        assert soonest is None or usd(soonest) <= budget
        days.append(float("inf") if soonest is None else soonest.days)
    assert days == sorted(days, reverse=True)
    assert days[0] == float("inf") and days[-1] < days[2] / 1.5


def test_the_answers_are_the_least_by_brute_force() -> None:
    goal = Goal(deadline_s=40 * DAY_S, budget_usd=60_000)
    found = compared(
        request("llama-3-8b", H100, A100, seq=8192, batch=512, tokens=1000 * BILLION, goal=goal, least=True)
    )
    kept = [o for o in found.options if o.days <= 40 and usd(o) <= 60_000]
    answers = answers_of(found)
    assert kept and len(kept) < len(found.options)
    assert answers.smallest and answers.smallest.devices == min(o.devices for o in kept)
    assert answers.soonest and answers.soonest.days == min(o.days for o in kept)
    assert usd(answers.cheapest) == min(map(usd, kept))
    for outcome in answers.outcomes:
        own = [o for o in found.options if o.name.partition(" x ")[2] == outcome.offer]
        assert outcome.best in own
        assert (outcome.standing is Standing.KEEPS) == any(o in kept for o in own)
    order = [list(Standing).index(outcome.standing) for outcome in answers.outcomes]
    assert order == sorted(order)
    assert len({outcome.offer for outcome in answers.outcomes}) == len(answers.outcomes)


SOME = Wanted(devices=("h100", "l4", "t4"), providers=("aws", "gcp"))
RACKS = Wanted(devices=("gb300", "h100"), providers=("azure", "oci", "lambda"))


@pytest.mark.parametrize(
    ("wanted", "model", "tokens", "days", "budget"),
    [(SOME, "tinyllama-1.1b", 100 * BILLION, None, None), (SOME, "llama-3-8b", 10 * BILLION, 10, 2500.0),
     (RACKS, "tinyllama-1.1b", 10 * BILLION, 3, None), (RACKS, "llama-3-8b", 100 * BILLION, 10, None),
     (RACKS, "tinyllama-1.1b", 10 * BILLION, 1, None)],
)  # fmt: skip
def test_what_is_ruled_out_before_is_neither_the_cheapest_nor_the_smallest(
    wanted: Wanted,
    model: str,
    tokens: int,
    days: float | None,
    budget: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(floors, "LIKELIEST", 1)  # so that few kinds rule the others out
    goal = Goal(minimise=Minimise.COST, deadline_s=None if days is None else days * DAY_S, budget_usd=budget)
    some = find_offers(MARKET, wanted)
    asked = request(model, offers=some, tokens=tokens, goal=goal, least=True, most_devices=256)
    few = compared(dataclasses.replace(asked, thorough=False))
    assert sum(RULED_OUT in each.reason for each in few.left_out) > 0
    whole, part = answers_of(compared(asked)), answers_of(few)
    assert part.cheapest is not None and usd(part.cheapest) == usd(whole.cheapest)
    assert part.smallest is not None and whole.smallest is not None
    assert part.smallest.devices == whole.smallest.devices
    assert usd(part.smallest) == usd(whole.smallest)


def test_the_smallest_lies_between_two_rungs_and_fewer_nodes_are_late() -> None:
    """Halving finds the fewest nodes that keep the deadline, of those that share out the batch."""
    goal, run_of = Goal(deadline_s=33 * DAY_S), {"seq": 8192, "batch": 512, "tokens": 1000 * BILLION}
    smallest = answers_of(compared(request("llama-3-8b", H100, goal=goal, least=True, **run_of))).smallest
    assert smallest is not None and smallest.nodes not in ladder(64)
    counts = tuple(between(1, 2 * smallest.nodes, 512, 8))
    assert smallest.nodes in counts
    found = compared(request("llama-3-8b", H100, goal=goal, counts=counts, **run_of))
    same = [o for o in found.options if o.rate.pricing == smallest.rate.pricing]
    assert min(o.nodes for o in same if o.meets) == smallest.nodes
    assert any(not o.meets for o in same)


@pytest.mark.parametrize(
    ("text", "seq", "sequences"),
    [("512", 8192, 512), ("4Mtok", 8192, 512), ("4Mtok", 2048, 2048), ("4M tokens", 4096, 1024),
     ("1K", 4096, 1000), ("100Ktok", 4096, 24), ("4097tok", 4096, 1)],
)  # fmt: skip
def test_batches_in_sequences_and_in_tokens(text: str, seq: int, sequences: int) -> None:
    assert read_batch(text, seq) == sequences


def test_a_batch_in_tokens_is_close_and_halves_often() -> None:
    for tokens, seq in itertools.product((10**6, 3 * 10**6, 16 * 10**6), (1024, 5000, 8192)):
        found = read_batch(f"{tokens}tok", seq)
        assert abs(found * seq - tokens) <= CLOSE * tokens + seq
        exact = round(tokens / seq)
        assert found & -found >= exact & -exact


@pytest.mark.parametrize("text", ["", "tok", "many", "-4", "0", "1.5", "nan", "4Mtoks of text", "100tok"])
def test_wrong_batches(text: str) -> None:
    with pytest.raises(InputError, match="--batch"):
        read_batch(text, 8192)


def test_tokens_are_compute_optimal_where_nobody_says_and_that_is_told() -> None:
    line = ("size", "--model", "tinyllama-1.1b", *ON_H100, "--nodes", "1")
    told = document(*line)
    law = recommended(load_laws())
    expected = round(optimal_tokens(law, load_model("tinyllama-1.1b").params_total))
    assert told["workload"]["tokens"] == expected
    assert "compute-optimal" in told["tokens_note"] and law.title in told["tokens_note"]
    assert told["workload"]["batch"] == 1024  # 4Mtok of 4096
    text = run(*line).stdout
    assert "compute-optimal" in text.splitlines()[0]
    cluster = document("size", "--model", "gpt2", "--seq", "1024", "--cluster", "1x1:h100", code=0)
    assert "compute-optimal" in cluster["tokens_note"] and cluster["workload"]["tokens"] > BILLION


def test_epochs_multiply_the_tokens_of_the_data() -> None:
    told = document(*LINE, *ON_H100, "--nodes", "1", "--epochs", "2.5")
    assert told["workload"]["tokens"] == 25 * BILLION and "2.5 times" in told["tokens_note"]
    refused = run("size", "--model", "gpt2", "--seq", "1024", *ON_H100, "--epochs", "2")
    assert refused.exit_code == 2 and "--epochs" in refused.stderr and "add --tokens" in refused.stderr


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_methods_on_given_data_need_its_tokens(method: str) -> None:
    for more in (ON_H100, ("--cluster", "1x8:h100")):
        refused = run("size", "--model", "gpt2", "--seq", "1024", *more, "--method", method)
        assert refused.exit_code == 2 and not refused.stdout
        assert f"--method {method}" in refused.stderr and "add --tokens" in refused.stderr
    told = document("size", "--model", "gpt2", "--seq", "1024", "--method", method, "--tokens", "50M",
                    *ON_H100, "--nodes", "1")  # fmt: skip
    assert told["workload"]["method"] == method and told["options"]


def test_options_of_adapters_without_adapters_are_refused() -> None:
    refused = run(*LINE, *ON_H100, "--lora-rank", "8")
    assert refused.exit_code == 2 and "add --method lora" in refused.stderr


def test_the_document_names_the_answers_and_each_offer() -> None:
    told = document(*LINE, "--instance", H100, "--instance", A100, "--deadline", "2")
    assert {"smallest", "cheapest", "soonest"} == told["answers"].keys()
    names = {each["name"] for each in told["options"] if each["meets"]}
    assert {each["name"] for each in told["answers"].values()} <= names
    assert {each["offer"] for each in told["offers"]} >= {
        "aws/p5.48xlarge, spot",
        "aws/p4d.24xlarge, on-demand",
    }
    text = run(*LINE, "--instance", H100, "--instance", A100, "--deadline", "2").stdout
    for name in names & {each["name"] for each in told["answers"].values()}:
        assert name in text


def test_nobody_meets_an_impossible_deadline() -> None:
    line = (*LINE, *ON_H100, "--nodes", "1", "--nodes", "2", "--deadline", "1min")
    result = run(*line)
    assert result.exit_code == 3 and not result.stdout and "Traceback" not in result.stderr
    told = document(*line, code=3)
    soonest = min(told["options"], key=lambda each: each["days"])
    assert soonest["name"] in result.stderr
    help_ = result.stderr.partition("--deadline ")[2]
    assert "What would help" in result.stderr and help_
    assert told["answers"] == {"smallest": None, "cheapest": None, "soonest": None}
    assert {each["standing"] for each in told["offers"]} == {"misses the deadline"}


def helped(stderr: str) -> list[str]:
    """The flags that an answer names as help."""
    words = stderr.partition("What would help: ")[2].partition(", for")[0].replace(" and ", " ").split()
    assert words[0].startswith("--"), stderr
    return words


@pytest.mark.parametrize("limit", [("--deadline", "1min"), ("--deadline", "1h"), ("--budget", "3")])
def test_what_is_said_to_help_helps(limit: tuple[str, str]) -> None:
    line = (*LINE, *ON_H100, "--nodes", "1", "--nodes", "2")
    result = run(*line, *limit)
    assert result.exit_code == 3
    assert run(*line, *helped(result.stderr)).exit_code == 0


def test_a_budget_that_is_too_small_says_what_it_buys() -> None:
    line = (*LINE, *ON_H100, "--nodes", "1", "--budget", "10")
    told = document(*line, code=3)
    cheapest = min(each["cost_usd"] for each in told["options"])
    result = run(*line)
    assert result.exit_code == 3 and "the budget buys" in result.stderr
    bought = parse_count(result.stderr.partition("the budget buys ")[2].partition(" tokens")[0])
    assert bought == pytest.approx(10 / cheapest * 10 * BILLION, rel=0.01)
    assert {each["standing"] for each in told["offers"]} == {"is beyond the budget"}


def test_nothing_fits() -> None:
    line = ("size", "--model", "llama-3-70b", "--instance", "g5.48xlarge", "--nodes", "1", "--batch", "64")
    result = run(*line)
    assert result.exit_code == 3 and not result.stdout
    assert "weights, gradients and optimizer state take at least" in result.stderr
    told = document(*line, code=3)
    assert told["options"] == [] and told["left_out"][0]["offer"] == "aws/g5.48xlarge"


def test_nothing_fits_before_the_deadline() -> None:
    line = ("size", "--model", "llama-3-70b", "--instance", "g5.48xlarge", "--max-devices", "32")
    result = run(*line, "--deadline", "3")
    assert result.exit_code == 3 and "a later --deadline, fewer --tokens" in result.stderr
    assert result.stderr.count("days even if all devices were at their peak") == 1


TERMINAL = 118


def test_the_text_fits_a_terminal_and_shows_what_was_asked_and_found() -> None:
    line = (*LINE, "--device", "h100", "--device", "a10", "--provider", "aws", "--provider", "on-premises",
            "--provider", "lambda", "--deadline", "2", "--budget", "2000")  # fmt: skip
    result, told = run(*line), document(*line)
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= TERMINAL
    title = " ".join(result.stdout.splitlines()[:2])
    for words in ("tinyllama-1.1b (1.1B parameters)", "10B tokens", "256 x 2048", "2 days", "$2,000"):
        assert words in title
    for each in told["answers"].values():
        assert each["name"] in result.stdout
    for option in told["options"]:
        if option["name"] in {each["name"] for each in told["answers"].values()}:
            assert (
                option["plan"]["label"] in result.stdout and short_money(option["cost_usd"]) in result.stdout
            )
    assert "as of 20" in result.stdout and "undated" not in result.stdout
    assert "nodes that the provider takes back" not in result.stdout  # they are counted
    assert "--objective time tries all" in result.stdout
    assert "--objective time tries all" not in run(*line, "--objective", "time").stdout


@pytest.mark.parametrize(
    ("usd", "text"),
    [(None, "unknown"), (1.2, "$1.20"), (999, "$999.00"), (9994, "$9,994"), (9995, "$9.99K"),
     (12_345, "$12.3K"), (192_400, "$192K"), (999_499, "$999K"), (999_500, "$1.00M"), (1.74e6, "$1.74M"),
     (3.2e9, "$3.20B"), (5e12, "$5,000,000,000,000")],
)  # fmt: skip
def test_short_dollars(usd: float | None, text: str) -> None:
    assert short_money(usd) == text


@pytest.mark.parametrize(
    ("days", "text"), [(0.0123, "0.012"), (1.26, "1.3"), (99.94, "99.9"), (1234.5, "1,234")]
)
def test_days_have_the_digits_that_tell_them_apart(days: float, text: str) -> None:
    assert days_text(days) == text


def test_all_faults_are_told_at_once() -> None:
    result = run(
        "size", "--model", "gpt3x", "--device", "h1000", "--instance", "p5.48xl", "--provider", "awz",
        "--deadline", "soon", "--budget", "lots", "--batch", "many", "--tokens", "z", "--seq", "1024",
        "--memory-limit", "zz", "--prices", "/nowhere/prices.toml", "--checkpoint-every", "often", "--json",
    )  # fmt: skip
    assert result.exit_code == 2 and not result.stdout and "Traceback" not in result.stderr
    for flag in ("--model", "--device", "--instance", "--provider", "--deadline", "--budget", "--batch",
                 "--tokens", "--memory-limit", "/nowhere/prices.toml", "--checkpoint-every"):  # fmt: skip
        assert f"error: {flag}: " in result.stderr, flag
    for near in ("gpt-3", "h100", "p5.48xlarge", "aws"):
        assert near in result.stderr


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--seq", "4096"), "learned positions"),
        (("--nodes", "0"), "--nodes"),
        (("--max-devices", "0"), "--max-devices"),
        (("--pricing", "barter"), "--pricing"),
        (("--epochs", "0"), "--epochs"),
        (("--deadline", "-3"), "--deadline"),
        (("--budget", "5 euros"), "--budget"),
    ],
)
def test_wrong_values(more: tuple[str, str], told: str) -> None:
    line = ("size", "--model", "gpt2", "--seq", "1024", "--tokens", "1B", *ON_H100)
    result = run(*line, *more)
    assert result.exit_code == 2 and told in result.stderr and not result.stdout


def test_the_most_devices_limit_the_options() -> None:
    told = document(*LINE, *ON_H100, "--objective", "time", "--max-devices", "32")
    assert {each["nodes"] for each in told["options"]} == {1, 2, 4}


def test_a_plan_is_written_for_the_best_option(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    line = ("size", "--model", "gpt2", "--seq", "1024", "--batch", "64", "--tokens", "1B", *ON_H100)
    result = run(*line, "--nodes", "1", "-o", str(path))
    assert result.exit_code == 0 and f"wrote {path}" in result.stderr
    written = json.loads(path.read_text(encoding="utf-8"))
    told = document(*line, "--nodes", "1")
    assert written["cluster"]["groups"][0]["nodes"] == 1
    assert written["estimate"]["step_time_s"] <= 1.001 * told["options"][0]["step_time_s"]
    assert run("check", str(path)).exit_code == 0


def test_what_a_cluster_can_do() -> None:
    of = catalog_problem("tinyllama-1.1b", "1x2:a100-sxm-40gb", 2048, 256, tokens="1B")
    found = ability_of(of)
    assert found.plan is not None and found.longest is not None and found.largest is not None

    def fits(seq: int, batch: int) -> bool:
        other = dataclasses.replace(of, workload=dataclasses.replace(of.workload, seq=seq, batch=batch))
        return Scout(other, Shared(FixedChoices())).plan(of.cluster) is not None

    longest = found.longest
    rung = 1 << (longest.seq.bit_length() - 1)
    assert longest.seq % (rung // SEQ_PART) == 0
    assert fits(longest.seq, longest.batch) and not fits(longest.seq + rung // SEQ_PART, longest.batch)
    assert found.largest.params_total > of.model.params_total
    more = dataclasses.replace(of, cluster=parse_cluster("1x4:a100-sxm-40gb"))
    assert Scout(more, Shared(FixedChoices())).plan(more.cluster) is not None


def test_size_of_a_given_cluster(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    line = ("size", "--model", "gpt2", "--seq", "1024", "--batch", "64", "--tokens", "1B")
    told = document(*line, "--cluster", f"1*{H100}", "--deadline", "1h", "-o", str(path))
    (option,) = told["options"]
    assert (option["provider"], option["instance"], option["nodes"], option["devices"]) == ("aws", H100, 1, 8)
    assert option["days"] > 0 and option["cost_usd"] > 0 and option["goodput"] <= 1
    assert option["meets"] == (option["days"] * 24 <= 1)
    assert told["longest"]["seq"] == 1024 and "learned positions" in told["longest"]["bound"]
    assert told["largest"]["params_total"] > 10**9
    assert json.loads(path.read_text(encoding="utf-8"))["estimate"]["step_time_s"] == pytest.approx(
        option["step_time_s"], rel=0.02
    )


def test_size_of_a_mixed_cluster() -> None:
    text = run("size", "--model", "gpt2", "--seq", "1024", "--batch", "64", "--tokens", "1B", "--cluster",
               "1x1:h100+1x1:a100-sxm-80gb", "--budget", "1").stdout  # fmt: skip
    assert "dollars" in text and "unknown" in text and "largest model" in text


def test_a_cluster_that_is_too_small() -> None:
    line = ("size", "--model", "llama-3-8b", "--batch", "8", "--cluster", "1x1:a10")
    result = run(*line)
    assert (
        result.exit_code == 3 and "no feasible plan" in result.stderr and "What would help" in result.stderr
    )
    told = document(*line, code=3)
    assert told["options"] == [] and told["why_not"] and told["longest"] is None
    assert 0 < told["largest"]["params_total"] < 8 * BILLION


def test_a_cluster_and_other_hardware_are_refused_together() -> None:
    result = run("size", "--model", "gpt2", "--seq", "1024", "--cluster", "1x1:h100", "--device", "h100",
                 "--nodes", "2", "--max-devices", "9", "--batch", "x", "--tokens", "y", "--deadline",
                 "z")  # fmt: skip
    assert result.exit_code == 2 and not result.stdout
    for flag in ("--device", "--nodes", "--max-devices", "--batch", "--tokens", "--deadline"):
        assert f"{flag}: " in result.stderr, flag


def test_no_sequence_is_longer_than_the_positions_that_are_learned() -> None:
    from planner.hardware.catalog import load_model
    from planner.hardware.cluster_text import parse_cluster
    from planner.job.problem import PlanningProblem
    from planner.model.workload import Workload
    from planner.sizing.ability import longest_sequence

    model = dataclasses.replace(load_model("gpt2"), learned_positions=512, max_positions=512)
    cluster = parse_cluster("1x1:h100-sxm-80gb")
    limit = cluster.groups[0].device.usable_memory_bytes
    problem = PlanningProblem(
        model=model,
        workload=Workload(seq=256, batch=8),
        cluster=cluster,
        profile=None,
        memory_limit_bytes=limit,
    )
    longest = longest_sequence(problem)
    assert longest is not None and longest.seq == 512 and "512 learned positions" in longest.bound
