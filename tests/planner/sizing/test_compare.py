"""`plan compare`: options by independent arithmetic and brute force, laws of what is asked, the document."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from planner.commands.hardware.sizing_document import comparison_document, options_csv
from planner.foundation.units import DAY_S
from planner.job.objective import Goal
from planner.job.problem import JobOverheads
from planner.model.workload import AdapterModules, Adapters, Method, Workload
from planner.sizing.comparison import Comparison, Option, Pricing
from planner.sizing.offers import Wanted, find_offers
from planner.sizing.search import scout_all
from planner.sizing.sized import with_pareto
from tests.sizing_cases import BILLION, MARKET, compared, document, offers, priced, request, run, sample

H100, A100, B200 = "p5.48xlarge", "p4d.24xlarge", "p6-b200.48xlarge"
GB200 = "p6e-gb200.36xlarge"
KEYS = {
    "cluster", "instance", "provider", "nodes", "devices", "plan", "step_time_s", "days", "cost_usd",
    "cost_interval_usd", "goodput", "pareto",
}  # fmt: skip
SMALL = ("--model", "tinyllama-1.1b", "--seq", "2048", "--batch", "256", "--tokens", "10B")


def usd(option: Option) -> float:
    return float("inf") if option.cost_usd is None else option.cost_usd


def best(found: Comparison) -> float:
    return min(map(usd, found.options), default=float("inf"))


def test_dollars_and_days_are_those_of_step_time_tokens_goodput_and_price() -> None:
    found = sample()
    tokens, per_step = found.workload.tokens, found.workload.seq * found.workload.batch
    assert tokens is not None and len(found.options) > 40
    for option in found.options:
        seconds = tokens / per_step * option.step_time_s / option.goodput
        assert option.days == pytest.approx(seconds / 86400, rel=1e-12)
        assert option.plan.step_time_s == option.step_time_s
        assert option.plan.tokens_per_s == pytest.approx(per_step / option.step_time_s)
        assert 0 < option.goodput <= 1
        price = option.rate.usd_per_node_hour
        assert price is not None and option.cost_usd is not None
        assert option.cost_usd == pytest.approx(price * option.nodes * seconds / 3600, rel=1e-12)
        assert option.usd_per_billion_tokens == pytest.approx(option.cost_usd / tokens * 1e9)


def test_intervals_hold_their_value_and_lie_where_step_time_and_rate_do() -> None:
    for option in sample().options:
        low, high = (end / option.step_time_s for end in option.plan.step_time_interval_s)
        assert low <= 1 <= high
        assert option.days_interval == pytest.approx((option.days * low, option.days * high))
        assert option.cost_interval_usd is not None and option.cost_usd is not None
        rate = option.rate
        price = rate.usd_per_node_hour or 0.0
        cheap = price if rate.low_usd_per_node_hour is None else rate.low_usd_per_node_hour
        dear = price if rate.high_usd_per_node_hour is None else rate.high_usd_per_node_hour
        ends = option.cost_usd * low * cheap / price, option.cost_usd * high * dear / price
        assert option.cost_interval_usd == pytest.approx(ends)
        assert ends[0] <= option.cost_usd <= ends[1]
    reserved = [o for o in sample().options if o.rate.low_usd_per_node_hour is not None]
    assert reserved and all(o.cost_interval_usd[0] < o.cost_interval_usd[1] for o in reserved)  # type: ignore[index]


def test_spares_are_paid_like_nodes_in_use() -> None:
    asked = request("tinyllama-1.1b", H100, counts=(2, 4))
    none = compared(asked).options
    spare = {
        (o.nodes, o.rate.pricing): o
        for o in compared(dataclasses.replace(asked, overheads=JobOverheads(spares=2))).options
    }
    for option in none:
        other = spare[option.nodes, option.rate.pricing]
        hours = other.days * 24
        assert other.rate.usd_per_node_hour is not None and other.cost_usd is not None
        assert other.cost_usd == pytest.approx(other.rate.usd_per_node_hour * (option.nodes + 2) * hours)


def test_spot_keeps_no_more_than_other_ways_to_pay() -> None:
    groups: dict[tuple[str, int], list[Option]] = {}
    for option in sample().options:
        groups.setdefault((option.cluster, option.nodes), []).append(option)
    compared_ones = 0
    for same in groups.values():
        spot = [o for o in same if o.rate.pricing is Pricing.SPOT]
        rest = [o for o in same if o.rate.pricing is not Pricing.SPOT]
        for one, other in itertools.product(spot, rest):
            assert one.goodput < other.goodput and one.days > other.days
            assert one.plan == other.plan
            compared_ones += 1
    assert compared_ones > 10


def dominated(option: Option, options: tuple[Option, ...]) -> bool:
    return any(
        usd(o) <= usd(option) and o.days <= option.days and (usd(o) < usd(option) or o.days < option.days)
        for o in options
    )


def drawn(seed: int) -> list[Option]:
    """Options with random figures, some of them equal, some without a price."""
    draw, some = random.Random(seed), sample().options
    found = []
    for number in range(40):
        one = draw.choice(some)
        cost = None if draw.random() < 0.2 else float(draw.randint(1, 12))
        days, meets = float(draw.randint(1, 12)), draw.random() < 0.6
        found.append(
            dataclasses.replace(one, cost_usd=cost, days=days, meets=meets, nodes=number, pareto=False)
        )
    return found


@pytest.mark.parametrize("seed", range(12))
def test_marked_are_those_that_nothing_beats_by_brute_force(seed: int) -> None:
    options = with_pareto(drawn(seed))
    assert len(options) == 40
    for option in options:
        if option.cost_usd is None:
            assert not option.pareto
        elif option.pareto:
            assert not dominated(option, options)
        else:  # beaten, or as good as one that is marked
            equals = [
                o for o in options if o.pareto and (o.cost_usd, o.days) == (option.cost_usd, option.days)
            ]
            assert dominated(option, options) or equals
    order = [(not o.meets, o.cost_usd is None, o.cost_usd or 0.0, o.days) for o in options]
    assert order == sorted(order)


def test_without_any_price_the_soonest_is_marked() -> None:
    options = with_pareto([dataclasses.replace(o, cost_usd=None) for o in drawn(3)])
    marked = [o for o in options if o.pareto]
    assert len(marked) == 1 and marked[0].days == min(o.days for o in options)


def test_marks_and_order_of_a_real_comparison() -> None:
    goal = Goal(deadline_s=4 * DAY_S, budget_usd=6000)
    found = compared(request("llama-3-8b", H100, A100, batch=512, counts=(1, 2, 4, 8, 16), goal=goal))
    assert {o.meets for o in found.options} == {True, False}
    for option in found.options:
        kept = option.days <= 4 and usd(option) <= 6000
        assert option.meets == kept
        assert option.pareto == (not dominated(option, found.options))
    order = [(not o.meets, usd(o)) for o in found.options]
    assert order == sorted(order)
    assert found.pareto == tuple(o for o in found.options if o.pareto)


CASES = [
    ("tinyllama-1.1b", (H100, A100), 2048, 256),
    ("llama-3-8b", (H100, B200), 8192, 480),
    ("mixtral-8x7b", (H100, GB200), 4096, 512),
]


@pytest.mark.parametrize(("model", "names", "seq", "batch"), CASES)
def test_more_offers_and_more_counts_never_make_the_best_worse(
    model: str, names: tuple[str, ...], seq: int, batch: int
) -> None:
    """Options of an offer and a count are the same whatever else is asked for."""
    alone = [compared(request(model, name, seq=seq, batch=batch, counts=(4, 8))) for name in names]
    both = compared(request(model, *names, seq=seq, batch=batch, counts=(4, 8)))
    more = compared(request(model, *names, seq=seq, batch=batch, counts=(1, 2, 4, 6, 8)))
    assert best(both) == min(map(best, alone)) < float("inf")
    assert best(more) <= best(both)

    def by_name(found: Comparison) -> dict[str, Option]:
        return {o.name: dataclasses.replace(o, pareto=False) for o in found.options}

    for few in alone:
        assert by_name(few).items() <= by_name(both).items()
    assert by_name(both).items() <= by_name(more).items()
    ladder = compared(request(model, *names, seq=seq, batch=batch, most_devices=256))
    assert by_name(compared(request(model, *names, seq=seq, batch=batch, counts=(1, 2, 4)))).items() <= (
        by_name(ladder).items()
    )


@pytest.mark.parametrize("seed", range(4))
def test_cheaper_prices_never_cost_more_and_change_no_days(seed: int) -> None:
    draw = random.Random(seed)
    asked = request("tinyllama-1.1b", H100, A100, counts=(1, 2, 4))
    factors = [draw.uniform(0.3, 1.0) for _ in asked.offers]
    cheaper = dataclasses.replace(
        asked, offers=tuple(priced(o, f) for o, f in zip(asked.offers, factors, strict=True))
    )
    before = {o.name: o for o in compared(asked).options}
    after = {o.name: o for o in compared(cheaper).options}
    assert before.keys() == after.keys()
    for name, option in before.items():
        factor = factors[0] if option.instance == H100 else factors[1]
        assert usd(after[name]) == pytest.approx(factor * usd(option))
        assert (after[name].days, after[name].plan) == (option.days, option.plan)


@pytest.mark.parametrize("changed", [{"tokens": 50 * BILLION}, {"model": "tinyllama-1.1b"}])
def test_less_work_costs_less(changed: dict[str, Any]) -> None:
    whole = {o.name: o for o in compared(request("llama-3-8b", H100, counts=(2, 4))).options}
    less = {"model": "llama-3-8b", "counts": (2, 4), "offers": offers(H100)} | changed
    part = {o.name: o for o in compared(request(**less)).options}
    assert whole.keys() <= part.keys()
    for name, option in whole.items():
        assert usd(part[name]) < usd(option) and part[name].days < option.days


def test_a_smaller_memory_limit_is_never_faster() -> None:
    asked = request("llama-3-8b", H100, counts=(1, 2, 4))
    whole = {o.name: o for o in compared(asked).options}
    limit = 40 * 2**30
    tight = {o.name: o for o in compared(dataclasses.replace(asked, memory_limit_bytes=limit)).options}
    assert tight and tight.keys() <= whole.keys()
    for name, option in tight.items():
        assert option.plan.peak_memory_bytes < option.plan.memory_limit_bytes == limit
        assert (
            option.step_time_s >= 0.97 * whole[name].step_time_s
        )  # the scout's choice is not always the best


def test_identical_inputs_give_identical_documents_whatever_the_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = H100, A100, B200, "a3-highgpu-8g", "lambda/gpu_1x_a10", "g5.48xlarge", "g6.48xlarge", GB200
    asked = request("tinyllama-1.1b", *names, counts=(1, 2))
    written = []
    for cores in (1, 2, 4):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
        written.append(json.dumps(comparison_document(compared(asked))))
    assert written[0] == written[1] == written[2]


def test_known_plans_serve_other_limits_prices_and_tokens() -> None:
    known: dict[Any, Any] = {}
    asked = request("tinyllama-1.1b", H100, A100, counts=(1, 2))
    calls: list[int] = []
    scout_all(asked, MARKET, lambda done, of: calls.append(done), known)
    other = dataclasses.replace(
        asked,
        goal=Goal(budget_usd=100.0),
        offers=tuple(priced(o, 0.5) for o in asked.offers),
        workload=dataclasses.replace(asked.workload, tokens=7 * BILLION),
    )
    seen = len(calls)
    again = scout_all(other, MARKET, lambda done, of: calls.append(done), known)
    assert len(calls) == seen
    fresh = scout_all(other, MARKET, lambda done, of: None, {})
    assert again == fresh


def test_offers_without_a_plan_say_why() -> None:
    left = {each.offer: each.reason for each in sample().left_out}
    assert set(left) == {"lambda/gpu_1x_a10", "gcp/g2-standard-4"}
    assert "weights, gradients and optimizer state take at least" in left["lambda/gpu_1x_a10"]
    assert "what connects several of its nodes is not known" in left["lambda/gpu_1x_a10"]


def test_an_offer_whose_network_is_unknown_is_one_node_alone() -> None:
    unknown = "lambda/gpu_8x_h100_sxm5"
    assert offers(unknown)[0].network == ""
    for more in ({}, {"counts": (1, 2, 4)}, {"least": True}):
        found = compared(request("tinyllama-1.1b", unknown, **more))
        assert {o.nodes for o in found.options} == {1}
        assert {o.cluster for o in found.options} == {f"1*{unknown}"}


@pytest.mark.parametrize("name", [GB200, "gcp/ct5p-hightpu-4t", "lambda/gpu_1x_h100_sxm5", "p5.4xlarge"])
def test_racks_tpus_and_single_devices_have_options_that_estimate_takes(name: str) -> None:
    found = compared(request("tinyllama-1.1b", name, counts=(1, 2)))
    assert found.options
    for option in found.options:
        assert option.devices == option.nodes * offers(name)[0].devices_per_node
    option = found.options[0]
    fixed = degrees_of(option)
    line = ("estimate", "--model", "tinyllama-1.1b", "--cluster", option.cluster, "--seq", "2048")
    told = document(*line, "--batch", "256", *fixed)
    assert told["estimate"]["step_time_s"] == pytest.approx(option.step_time_s, rel=0.2)
    assert told["estimate"]["verdict"] == "SAFE"


def degrees_of(option: Option) -> list[str]:
    """The option's plan as --fix takes it, without a mix of recomputation."""
    d = option.plan.strategy.degrees
    values = {"tp": d.tp, "pp": d.pp, "dp": d.dp, "zero": int(d.zero), "micro_batch": d.micro_batch}
    return [word for name, value in values.items() for word in ("--fix", f"{name}={value}")]


def test_the_document_has_the_fixed_keys_and_clusters_that_can_be_given_back() -> None:
    told = document("compare", *SMALL, "--instance", H100, "--nodes", "1", "--nodes", "2")
    assert {each["nodes"] for each in told["options"]} == {1, 2}
    for each in told["options"]:
        assert each.keys() >= KEYS
        low, high = each["cost_interval_usd"]
        assert low <= each["cost_usd"] <= high
        assert each["plan"]["verdict"] == "SAFE" and each["plan"]["strategy"]["tp"] >= 1
    assert told["workload"]["tokens"] == 10 * BILLION
    assert told["assumptions"] and all(each["source"] for each in told["assumptions"])
    given = told["options"][-1]["cluster"]
    back = document("estimate", *SMALL[:6], "--cluster", given, "--fix", "tp=1", "--fix", "zero=1")
    assert back["cluster"]["name"] == given or back["cluster"]


def test_prices_that_nobody_knows_are_null_and_said_to_be_unknown() -> None:
    known = find_offers(MARKET, Wanted(providers=("azure", "oci", "coreweave")))
    name = next(o.name for o in known if o.instance and not any(r.usd_per_node_hour for r in o.rates))
    told = document("compare", *SMALL, "--instance", name, "--nodes", "1")
    assert told["options"]
    for each in told["options"]:
        assert each["cost_usd"] is each["cost_interval_usd"] is each["usd_per_billion_tokens"] is None
        assert each["days"] > 0
    assert "unknown" in run("compare", *SMALL, "--instance", name, "--nodes", "1").stdout
    assert "$0" not in run("compare", *SMALL, "--instance", name, "--nodes", "1").stdout
    budget = document("compare", *SMALL, "--instance", name, "--nodes", "1", "--budget", "1M", code=3)
    assert not any(each["meets"] for each in budget["options"])


def test_the_table_has_a_line_an_option(tmp_path: Path) -> None:
    path = tmp_path / "options.csv"
    line = ("compare", *SMALL, "--instance", H100, "--instance", A100, "--nodes", "1", "--nodes", "3")
    told = document(*line, "--csv", str(path))
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    assert len(rows) == len(told["options"]) > 4
    for row, each in zip(rows, told["options"], strict=True):
        assert (row["cluster"], row["pricing"]) == (each["cluster"], each["rate"]["pricing"])
        assert float(row["cost_usd"]) == pytest.approx(each["cost_usd"])
        assert float(row["days_high"]) == pytest.approx(each["days_interval"][1])
        assert row["pareto"] == str(each["pareto"])
    unpriced = dataclasses.replace(
        sample(), options=tuple(dataclasses.replace(o, cost_usd=None) for o in sample().options)
    )
    cells = list(csv.DictReader(io.StringIO(options_csv(unpriced))))
    assert all(row["cost_usd"] == "" for row in cells) and len(cells) == len(sample().options)


def test_all_shows_every_option_in_a_line() -> None:
    line = ("compare", *SMALL, "--instance", H100, "--nodes", "1", "--nodes", "2")
    text, told = run(*line, "--all").stdout, document(*line)
    for each in told["options"]:
        assert each["name"] in text
    assert "no option is both cheaper and sooner" in text


def test_the_text_fits_a_terminal_and_shows_what_was_asked_and_found() -> None:
    line = ("compare", *SMALL, "--device", "h100", "--device", "a10", "--provider", "aws", "--provider",
            "lambda", "--provider", "on-premises", "--nodes", "2", "--nodes", "4")  # fmt: skip
    result, told = run(*line), document(*line)
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= 118
    for option in told["options"]:
        if option["pareto"]:
            assert option["name"] in result.stdout and option["plan"]["label"] in result.stdout
    for words in ("10B tokens", "256 x 2048", "cheaper above", "assumed", "not modelled", "all prices"):
        assert words in result.stdout
    together = " ".join(result.stdout.split())
    reasons = [each["reason"] for each in told["left_out"]]
    assert all(together.count(reason) == 1 for reason in set(reasons))


def test_up_to_fifty_counts_and_no_more() -> None:
    counts = [word for nodes in range(1, 52) for word in ("--nodes", str(nodes))]
    line = ("compare", "--model", "gpt2", "--seq", "1024", "--batch", "3600", "--tokens", "1B")
    h100 = ("--instance", H100, "--pricing", "on-demand")
    told = document(*line, *h100, *counts[:-2])
    found = {each["nodes"] for each in told["options"]}
    assert found <= set(range(1, 51)) and {1, 2, 3, 5, 9, 50} <= found
    refused = run(*line, *h100, *counts)
    assert refused.exit_code == 2 and "51 numbers of nodes" in refused.stderr and "1 to 50" in refused.stderr


def test_the_wrong_prices_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text("[instances]\n'p5.48xlarge' = 'cheap'\n", encoding="utf-8")
    for file in (path, tmp_path / "absent.toml"):
        result = run("compare", *SMALL, "--instance", H100, "--prices", str(file))
        assert result.exit_code == 2 and not result.stdout
        assert str(file) in result.stderr and "Traceback" not in result.stderr


def test_lora_and_finetuning_cost_less_than_all_weights_from_scratch() -> None:
    each = {}
    for method in (Method.PRETRAIN, Method.LORA):
        asked = request("llama-3-8b", H100, counts=(1,))
        adapters = None
        if method is Method.LORA:
            adapters = Adapters(rank=16, modules=AdapterModules.ALL)
        workload = Workload(seq=2048, batch=256, tokens=BILLION, method=method, adapters=adapters)
        each[method] = best(compared(dataclasses.replace(asked, workload=workload)))
    assert each[Method.LORA] < each[Method.PRETRAIN] < float("inf")
