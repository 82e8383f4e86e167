"""First principles: the lecture's numbers to the digit, what it leaves out, the four ways, the command."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from planner.cli import cli
from planner.foundation.units import GIB
from planner.hardware.catalog import load_device, load_model
from planner.hardware.instance import Instance
from planner.hardware.prices import Market
from planner.model.huggingface import read_config
from planner.model.lora import adapted, adapter_params
from planner.model.workload import AdapterModules, Adapters, Precision
from planner.sizing.device_rate import Price, device_rate, price_of, published_mfu
from planner.sizing.napkin import (
    Question,
    bare_size,
    left_out,
    model_size,
    reference_shape,
    rule_of_thumb,
    short,
)
from planner.sizing.napkin_methods import (
    Method,
    activations_bytes,
    cluster_of,
    evaluated,
    methods,
    node_shape,
    own_estimate,
)
from planner.strategy.estimate import Verdict


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["napkin", *arguments], prog_name="plan")


def run_json(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def lecture() -> Any:
    return run_json("--model", "7B", "--device", "a100-sxm-40gb")


def question(model: str = "", devices: int | None = None, device: str = "a100-sxm-40gb") -> Question:
    size = model_size(load_model(model)) if model else bare_size(7_000_000_000, 4096)
    price = Price(usd_per_device_hour=2.0, source="as given")
    return Question(
        size=size,
        rate=device_rate(load_device(device), None, 0.5, price),
        tokens=140_000_000_000,
        tokens_formula="as given",
        finetune_tokens=100_000_000,
        finetune_note="as given",
        seq=4096,
        adapters=Adapters(rank=16, modules=AdapterModules.ALL),
        devices=devices,
    )


def answered(q: Question) -> dict[str, Method]:
    own = own_estimate(q.size.shape, q.rate.name, Precision.BF16, q.seq, q.devices)
    return {method.name: method for method in methods(q, own, "")}


# The lecture, to the digit.


def test_the_lectures_numbers(lecture: Any) -> None:
    rule = {name: figure["value"] for name, figure in lecture["rule_of_thumb"].items()}
    assert rule["bytes_per_param"] == 2 + 4 + 2
    assert rule["memory_bytes"] == 56_000_000_000
    assert int(rule["memory_bytes"] / GIB * 100) / 100 == 52.15
    assert rule["tokens"] == 140_000_000_000
    assert rule["flops"] == pytest.approx(5.88e21, rel=1e-12)
    assert rule["seconds"] == pytest.approx(5.88e21 / 312e12, rel=1e-12)
    assert f"{rule['seconds']:.3g}" == "1.88e+07"
    assert int(rule["days"]) == 218


def test_the_lecture_is_printed_with_its_formulas() -> None:
    text = run("--model", "7B", "--device", "a100-sxm-40gb").stdout
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {
        "bytes a parameter 2 (weights) + 4 (optimizer) + 2 (gradients) 8 B",
        "memory 8 B x 7e9 5.6e10 B = 52.15 GiB",
        "tokens D = 20 N = 20 x 7e9 1.4e11 (140B)",
        "FLOPs 6 N D = 6 x 7e9 x 1.4e11 5.88e21",
        "time on one device C / peak = 5.88e21 / 3.12e14 1.88e7 s",
        "1.885e7 / 86400 218 days",
        "By this rule it needs 2 devices of 39.25 GiB.",
    } <= lines
    table = text.partition("cheapest first")[2]
    ways = ("prompting", "LoRA, rank 16", "full fine-tuning", "pretraining")
    order = [table.index(f"\n  {way}") for way in ways]
    assert order == sorted(order)


def test_every_number_has_its_formula(lecture: Any) -> None:
    figures = [*lecture["rule_of_thumb"].values(), *lecture["left_out"].values()]
    for method in lecture["methods"]:
        figures += [value for value in method.values() if isinstance(value, dict)]
    assert len(figures) > 40
    for figure in figures:
        assert figure["formula"] and figure["unit"]
        assert figure["value"] is not None or figure["note"]


def test_gpt_3_takes_its_published_flops() -> None:
    """Brown et al., arXiv 2005.14165, Table D.1: 3.14e23 FLOPs for 175B on 300B tokens."""
    rule = run_json("--model", "175B", "--tokens", "300B")["rule_of_thumb"]
    assert rule["flops"]["value"] == pytest.approx(3.14e23, rel=0.01)


# What the rule leaves out.


def test_mixed_precision_takes_16_or_18_bytes(lecture: Any) -> None:
    left = lecture["left_out"]
    assert left["mixed_precision_16_bytes"]["value"] == 16 * 7_000_000_000
    assert left["mixed_precision_18_bytes"]["value"] == 18 * 7_000_000_000
    assert left["logits_bytes"]["value"] == 4096 * 32_000 * 6


def test_activations_are_those_of_the_cost_model(lecture: Any) -> None:
    left = lecture["left_out"]
    own = activations_bytes(reference_shape(7_000_000_000, 4096), "a100-sxm-40gb", Precision.BF16, 4096)
    assert left["activations_none_recompute_bytes"]["value"] == own["none"]
    assert left["activations_full_recompute_bytes"]["value"] == own["full"]
    assert own["full"] < own["none"] / 5


def test_utilisation_divides_the_days(lecture: Any) -> None:
    days = lecture["rule_of_thumb"]["days"]["value"]
    left, device = lecture["left_out"], lecture["device"]
    assert left["days_at_assumed_mfu"]["value"] == pytest.approx(days / 0.40)
    assert left["days_at_low_mfu"]["value"] == pytest.approx(days / device["mfu_low"])
    assert left["days_at_high_mfu"]["value"] == pytest.approx(days / device["mfu_high"])


def test_attention_adds_to_6_n_d(lecture: Any) -> None:
    """Causal scores and values: 2 x 2 x d x (s + 1) / 2 FLOPs a layer and token, 3 times with backward."""
    extra = 3 * 32 * 2 * 2 * 4096 * (4096 + 1) / 2
    shape = reference_shape(7_000_000_000, 4096)
    params = shape.params_total - shape.vocab * shape.hidden
    assert lecture["left_out"]["attention_flops_ratio"]["value"] == pytest.approx(
        1 + extra / 6 / params, rel=1e-3
    )


def test_the_cost_model_stands_beside_it(lecture: Any) -> None:
    own = lecture["estimate"]
    assert lecture["estimate_missing"] is None
    assert own["verdict"] == "SAFE"
    assert own["peak_memory_bytes"] < own["memory_limit_bytes"]
    assert own["devices"] == 4
    pretrain = lecture["methods"][-1]
    assert pretrain["devices_min"]["value"] == own["devices"]
    assert pretrain["cost_model_days"]["value"] == pytest.approx(140e9 / own["tokens_per_s"] / 86400)


def test_the_fastest_safe_split_is_taken() -> None:
    shape = reference_shape(7_000_000_000, 4096)
    own = own_estimate(shape, "a100-sxm-40gb", Precision.BF16, 4096, 4)
    assert own is not None
    rates = [
        option.evaluation.estimate.tokens_per_s
        for tp in (1, 2, 4)
        for option in evaluated(shape, cluster_of(4, "a100-sxm-40gb"), Precision.BF16, 4096, tp)
        if option.evaluation.estimate.verdict is Verdict.SAFE
    ]
    assert len(rates) > 2
    assert own.tokens_per_s == max(rates)


def test_no_fewer_devices_would_do() -> None:
    own = own_estimate(reference_shape(7_000_000_000, 4096), "a100-sxm-40gb", Precision.BF16, 4096, 2)
    assert own is not None
    assert own.verdict != "SAFE"


# Shapes of bare sizes.


@pytest.mark.parametrize(
    ("params", "layers", "hidden"),
    [(7_000_000_000, 32, 4096), (13_000_000_000, 40, 5120), (175_000_000_000, 96, 12288)],
)
def test_a_bare_size_gets_a_published_shape(params: int, layers: int, hidden: int) -> None:
    """LLaMA 7B and 13B (arXiv 2302.13971, Table 2); GPT-3 175B (arXiv 2005.14165, Table 2.1)."""
    shape = reference_shape(params, 4096)
    assert (shape.layers, shape.hidden) == (layers, hidden)


def test_llama_7b_exactly() -> None:
    assert reference_shape(7_000_000_000, 2048).params_total == load_model("llama-7b").params_total


@pytest.mark.parametrize("billions", [1, 3, 7, 20, 34, 70, 180, 405, 1000, 10_000, 1_000_000])
def test_a_shape_is_near_its_size(billions: int) -> None:
    shape = reference_shape(billions * 10**9, 4096)
    assert shape.params_total == pytest.approx(billions * 1e9, rel=0.05)
    assert 80 <= shape.hidden / shape.layers <= 180
    assert shape.layers < 48 or shape.hidden % 1024 == 0


def test_the_answer_names_the_shape(lecture: Any) -> None:
    note = lecture["model"]["shape"]["note"]
    assert "llama-like" in note and "32 layers of 4096" in note and "-3.7%" in note


# The four ways.


def test_cheapest_first() -> None:
    ways = answered(question())
    assert list(ways) == ["prompting", "lora", "finetune", "pretrain"]
    usd = [method.usd.value for method in ways.values()]
    assert usd[0] == 0
    assert usd == sorted(usd, key=lambda value: value or 0)
    memory = [method.memory_bytes.value or 0 for method in ways.values()]
    assert memory[0] == 14e9
    assert memory[0] < memory[1] < memory[2]


def test_the_flops_and_dollars_of_each_way() -> None:
    ways = answered(question())
    adapters = 39_976_960
    assert ways["lora"].trained_params.value == adapters
    assert ways["lora"].flops.value == (4 * 7_000_000_000 + 6 * adapters) * 100_000_000
    assert ways["finetune"].flops.value == 6 * 7_000_000_000 * 100_000_000
    assert ways["pretrain"].flops.value == 6 * 7_000_000_000 * 140_000_000_000
    for method in list(ways.values())[1:]:
        device_hours = (method.flops.value or 0) / (312e12 * 0.5) / 3600
        assert method.usd.value == pytest.approx(2.0 * device_hours)
        assert method.seconds.value == pytest.approx(device_hours * 3600 / (method.devices_used or 0))


@pytest.mark.parametrize(
    ("model", "modules", "params"),
    [
        ("llama-2-7b", "all", 39_976_960),
        ("llama-3-8b", "all", 41_943_040),
        ("llama-2-7b", "qv", 8_388_608),
        ("llama-2-7b", "attention", 16_777_216),
        ("llama-3-8b", "qv", 6_815_744),
        ("gpt-3-175b", "qv", 75_497_472),
    ],
)
def test_adapters_of_rank_16(model: str, modules: str, params: int) -> None:
    """Counts of trainable parameters that peft prints; GPT-3: 4.7M at rank 1 (LoRA, arXiv 2106.09685)."""
    assert adapter_params(Adapters(rank=16, modules=AdapterModules(modules)), load_model(model)) == params


def test_adapters_grow_with_their_rank_and_their_modules() -> None:
    model = load_model("llama-3-8b")
    counts = [adapter_params(Adapters(rank=8, modules=modules), model) for modules in AdapterModules]
    assert counts == sorted(set(counts))
    doubled = [adapter_params(Adapters(rank=16, modules=modules), model) for modules in AdapterModules]
    assert doubled == [2 * count for count in counts]


def test_experts_and_routers_get_no_adapters() -> None:
    config = {
        "model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    model = read_config(config, source="sample", name="sample")
    layer = model.segments[0].block
    assert len(adapted(layer, "all")) == len(adapted(layer, "attention")) == 4
    size = model_size(model)
    assert size.sparse
    assert size.params_flops == model.params_active - 100 * 64


def test_more_devices_are_faster_and_cost_the_same() -> None:
    few, many = answered(question(devices=8)), answered(question(devices=16))
    assert (few["pretrain"].seconds.value or 0) == pytest.approx(2 * (many["pretrain"].seconds.value or 0))
    assert few["pretrain"].usd.value == many["pretrain"].usd.value


def test_too_few_devices_are_said_to_be_too_few() -> None:
    ways = answered(question(devices=1))
    assert ways["pretrain"].verdict == "NO"
    assert ways["lora"].verdict == "SAFE"
    assert "1: NO" in run("--model", "7B", "--devices", "1").stdout


def test_nodes_are_as_large_as_they_divide() -> None:
    assert [node_shape(devices) for devices in (1, 3, 8, 12, 64)] == [(1, 1), (1, 3), (1, 8), (2, 6), (8, 8)]


# Models, devices, prices.


def test_flops_do_not_count_the_input_embedding() -> None:
    size = model_size(load_model("llama-3-8b"))
    assert size.params == size.params_active == 8_030_261_248
    assert size.params_flops == size.params - 128_256 * 4096


def test_tied_embeddings_are_a_product_once() -> None:
    size = model_size(load_model("gpt2"))
    assert size.params_flops == size.params_active - 1024 * 768  # the table of positions is only looked up


def test_a_catalog_model_uses_its_own_shape() -> None:
    document = run_json("--model", "llama-3-8b", "--device", "h100")
    assert document["model"]["shape"]["layers"] == 32
    assert document["left_out"]["logits_bytes"]["value"] == 4096 * 128_256 * 6
    assert document["rule_of_thumb"]["tokens"]["value"] == pytest.approx(20 * 8_030_261_248)


def test_an_unknown_peak_is_no_guess() -> None:
    result = run("--model", "7B", "--device", "v100-sxm-32gb", "--precision", "bf16")
    assert result.exit_code == 0
    assert "peak unknown in bf16" in result.stdout
    assert "No peak is guessed: try --precision fp16." in result.stdout
    document = run_json("--model", "7B", "--device", "v100-sxm-32gb", "--precision", "bf16")
    assert document["rule_of_thumb"]["seconds"]["value"] is None
    assert document["rule_of_thumb"]["memory_bytes"]["value"] == 56e9
    assert document["methods"][-1]["usd"]["value"] is None
    assert document["estimate"]["precision"] == "fp16"


def test_a_device_without_bf16_computes_in_fp16() -> None:
    document = run_json("--model", "1B", "--device", "t4")
    assert document["device"]["precision"] == "fp16"
    assert document["rule_of_thumb"]["days"]["value"] == pytest.approx(6 * 20 * 1e18 / 65e12 / 86400)


def test_fp32_takes_twice_the_bytes_and_fp8_the_same() -> None:
    rules = {
        precision: run_json("--model", "7B", "--device", "h100", "--precision", precision)
        for precision in ("bf16", "fp32", "fp8")
    }
    each = {name: rule["rule_of_thumb"]["bytes_per_param"]["value"] for name, rule in rules.items()}
    assert each == {"bf16": 8, "fp32": 16, "fp8": 8}
    days = {name: rule["rule_of_thumb"]["days"]["value"] for name, rule in rules.items()}
    assert days["fp8"] == pytest.approx(days["bf16"] / 2, rel=0.01)
    assert days["fp32"] > 10 * days["bf16"]


def instance(name: str, usd: float, mark: str, devices: int = 1) -> Instance:
    return Instance(
        provider="p", name=name, device="a100-sxm-40gb", devices=devices, network="",
        ondemand_usd_per_hour=usd, spot_usd_per_hour=None, vcpus=None, ram_gib=None, intra_node="",
        inter_node="", region="", as_of="2026-09-06", price_mark=mark, network_mark="", reserved_note="",
        source="", note="",
    )  # fmt: skip


def test_the_cheapest_price_that_was_read() -> None:
    facts = load_device("a100-sxm-40gb")
    recalled, dear = instance("recalled", 0.5, "memory"), instance("dear", 4.0, "READ")
    cheap = instance("cheap", 16.0, "READ", 8)
    price = price_of(facts, Market(instances=(recalled, dear, cheap)))
    assert price is not None
    assert price.usd_per_device_hour == 2.0
    assert "p/cheap" in price.source and "2.00 to 4.00" in price.source and "2026-09-06" in price.source
    last = price_of(facts, Market(instances=(recalled,)))
    assert last is not None and "memory" in last.source
    own = price_of(facts, Market(instances=(recalled, cheap, instance("own", 9.0, "yours"))))
    assert own is not None and own.usd_per_device_hour == 9.0
    assert price_of(facts, Market(instances=())) is None


def test_no_price_is_said() -> None:
    result = run("--model", "7B", "--device", "gaudi3")
    assert "no price of this device is known: give --usd-per-gpu-hour" in " ".join(result.stdout.split())


def test_the_assumed_utilisation_is_published() -> None:
    published = published_mfu()
    low, high, runs = published.range_of("h100-sxm-80gb")
    assert (low, high) == (0.38, 0.457)
    assert all(run.sources for run in published.runs) and len(runs) == 3
    assert published.range_of("mi300x")[:2] == (0.38, 0.642)
    assert 0.38 <= published.default <= 0.642


# The command line.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "0"], "1M to 1e15"),
        (["--model", "-7B"], "units K, M, B, T, P"),
        (["--model", "nan"], "units"),
        (["--model", "1e400"], "--model"),
        (["--model", "7Q"], "--model"),
        (["--model", ""], "--model"),
        (["--model", "9" * 5000], "--model"),
        (["--model", "llama-3-9b"], "llama-3-8b"),
        (["--model", "./absent/config.json"], "no such file"),
        (["--model", "gpt2", "--seq", "2048"], "learned positions"),
        (["--model", "7B", "--device", "h101"], "h100"),
        (["--model", "7B", "--tokens", "0"], "--tokens"),
        (["--model", "7B", "--tokens", "1e400"], "--tokens"),
        (["--model", "7B", "--tokens-per-param", "nan"], "--tokens-per-param"),
        (["--model", "7B", "--tokens-per-param", "-1"], "--tokens-per-param"),
        (["--model", "7B", "--tokens", "1T", "--tokens-per-param", "20"], "contradicts"),
        (["--model", "7B", "--finetune-tokens", "-5"], "--finetune-tokens"),
        (["--model", "7B", "--mfu", "40"], "up to 1, such as 0.4"),
        (["--model", "7B", "--mfu", "0"], "--mfu"),
        (["--model", "7B", "--devices", "0"], "--devices"),
        (["--model", "7B", "--lora-rank", "0"], "--lora-rank"),
        (["--model", "7B", "--lora-rank", "5000"], "1 to 4096"),
        (["--model", "7B", "--seq", "0"], "--seq"),
        (["--model", "7B", "--usd-per-gpu-hour", "inf"], "--usd-per-gpu-hour"),
        (["--model", "7B", "--precision", "int4"], "bf16"),
        ([], "--model"),
    ],
)
def test_wrong_use(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr and len(result.stderr) < 1000
    assert result.stdout == ""


def test_all_problems_at_once() -> None:
    result = run("--model", "7Q", "--device", "h101", "--mfu", "7", "--tokens", "x")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 4


@pytest.mark.parametrize("arguments", [["--seq", "1"], ["--seq", "1048576"], ["--devices", "1000000"]])
def test_extremes_are_answered(arguments: list[str]) -> None:
    document = run_json("--model", "7B", *arguments)
    assert (document["estimate"] is None) == bool(document["estimate_missing"])


def test_what_nothing_holds_is_said() -> None:
    text = " ".join(run("--model", "1P").stdout.split())
    assert "no split over at most 131,072 devices" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.88e21, "5.88e21"), (7e9, "7e9"), (1e-5, "1e-5"), (0.4, "0.4"), (312.0, "312"), (1e10, "1e10")],
)
def test_numbers_as_people_write_them(value: float, text: str) -> None:
    assert short(value) == text


def test_left_out_without_the_cost_model() -> None:
    figures = {figure.name: figure for figure in left_out(question(), {}, "no reason")}
    assert figures["activations_bytes"].value is None and figures["activations_bytes"].note == "no reason"
    assert len(rule_of_thumb(question())) == 6
