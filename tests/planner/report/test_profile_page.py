"""The page of a profile: complete, self-contained, safe against hostile names, true to its figures."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Callable

import pytest

from planner.cost.stage.layer_cost import Residuals
from planner.foundation.units import format_seconds, format_si
from planner.model.sublayer import AttentionKernel, Recompute
from planner.model.workload import Precision
from planner.profile.coverage import (
    SampledClass,
    covered_models,
    rate_flops,
    sampled_classes,
    width_text,
)
from planner.profile.profile import (
    BlockResidual,
    BlockResiduals,
    BlockShape,
    LayerKind,
    OperatorKind,
    Profile,
)
from planner.report import curves as ticks
from planner.report.profile_layers import MOST_CLASSES
from planner.report.profile_lines import ProfileLines
from planner.report.profile_operators import operator_figure
from planner.report.profile_page import ProfilePage, build_profile_page, render_profile
from planner.report.profile_tables import best_rates
from tests import profile_samples as samples
from tests.html_reader import Reader
from tests.planner import sweeps

DAY = datetime.date(2026, 12, 24)


def built(profile: Profile) -> ProfilePage:
    return build_profile_page(profile, (), DAY)


@pytest.mark.parametrize("build", samples.SAMPLES.values(), ids=samples.SAMPLES)
def test_every_sample_is_one_document_that_fetches_nothing(build: Callable[[], Profile]) -> None:
    text = render_profile(build(), (), DAY)
    document = Reader(text)
    assert len(text.encode()) < 5_000_000
    fetching = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "formaction", "ping"}
    links = [value for _, name, value in document.attributes if name in fetching]
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(document.ids)
    assert len(document.ids) == len(set(document.ids))
    assert "nan" not in document.text.lower().split() and "inf" not in document.text.lower().split()


def test_hostile_names_stay_text() -> None:
    text = render_profile(samples.hostile(), (), DAY)
    document = Reader(text)
    assert document.tags.count("script") == 1 and "img" not in document.tags
    assert not any(name == "onerror" for _, name, _ in document.attributes)
    assert samples.HOSTILE in document.text


def test_every_measured_layer_is_a_dot_with_its_numbers() -> None:
    profile = samples.cpu()
    text = render_profile(profile, (), DAY)
    tips = re.findall(r'aria-label="(tp \d[^"]*: (?:forward|backward) [^"]*)"', text)
    plain = [s for s in profile.layers if s.recompute == "none"]
    assert len(tips) == 2 * len(plain)
    rows = [row for layer in built(profile).layers for row in layer.table.rows]
    assert len(rows) == len(profile.layers)


def test_every_swept_operator_is_a_dot_beside_what_the_others_say() -> None:
    rates = tuple(sweeps.samples(noise=0.02))
    profile = sweeps.profile(rates)
    text = render_profile(profile, (), DAY)
    tips = re.findall(r'aria-label="([^"]* measured, [^"]* by the others[^"]*)"', text)
    assert len(tips) == sum(1 + (sample.backward_s is not None) for sample in rates)
    assert any(tip.startswith("norm layernorm 32 x 16 bf16, backward: ") for tip in tips)
    figure = operator_figure(profile)
    assert figure is not None and re.search(r"half of them are within [1-5] %", figure.caption)
    assert operator_figure(sweeps.profile()) is None


def test_every_collective_is_a_dot() -> None:
    profile = samples.cpu()
    text = render_profile(profile, (), DAY)
    dots = re.findall(r'aria-label="[^"]*spread \d+ % of \d+ bursts"', text)
    assert len(dots) == len(profile.comms)


def test_the_line_goes_through_what_plans_are_charged() -> None:
    profile = samples.cpu()
    classes, lines = sampled_classes(profile), ProfileLines(profile)
    block = next(found for found in classes.values() if found.kind is LayerKind.BLOCK)
    own = [s for s in profile.layers if s.kind is LayerKind.BLOCK and s.recompute == "full" and s.tp == 1]
    assert block.model is not None
    small, large = (next(s for s in own if s.micro_batch == b) for b in (1, 4))
    between = lines.cost(block.model, small, 2.0)
    assert between is not None and between.origin == "interpolated"
    assert small.forward_s < between.forward_s < large.forward_s * 1.5
    alone = lines.cost(block.model, small, 1.0, sampled=False)
    assert alone is not None and alone.origin == "datasheet" and alone.saved_bytes == 256 * 256 * 4


def test_classes_formats_and_shards_are_told_apart() -> None:
    page = built(samples.rich())
    titles = [layer.title for layer in page.layers]
    assert titles[0] == "Block of mixtral-8x7b-v0.1, bf16"
    assert any(
        title.startswith("Block of llama-3-8b") and title.endswith("bf16 compiled") for title in titles
    )
    assert any(title.startswith("Block 1/2 of gemma-2-9b") for title in titles)
    assert any(title.startswith("Block 2/2 of gemma-2-9b") for title in titles)
    assert "Block h1-unknown, bf16" in titles
    widths = {row[0] for layer in page.layers for row in layer.table.rows}
    assert {"tp 1", "tp 4", "tp 1 ep 8", "tp 4 ep 8 etp 2", "tp 1 cp 4 ring"} <= widths
    assert len(page.layers) <= MOST_CLASSES or not page.layers[-1].figures
    assert any(figure.title == "Host time" for figure in page.quality)
    assert any("1,755 MHz in the median, 1,700 at least" in fact.value for fact in page.facts)
    assert any("SW power cap 12 %" in text and "HW" not in text for text in page.warnings)
    assert "Skipped: head of llama-3-8b at tp 1: too little memory" in page.warnings


def test_models_are_named_where_all_their_blocks_are_measured() -> None:
    classes = sampled_classes(samples.rich())
    assert {"mixtral-8x7b-v0.1", "llama-3-8b", "gemma-2-9b"} <= set(covered_models(classes))
    first = dict(list(classes.items())[:1])
    assert "gemma-2-9b" not in covered_models(first)


def test_rates_count_each_rank_s_share() -> None:
    whole, sharded = samples.sample("llama-3-8b"), samples.sample("llama-3-8b", tp=4)
    shared = samples.sample("llama-3-8b", cp=4)
    profile = samples.rich()
    found: SampledClass = sampled_classes(profile)[whole.kind, whole.shape_key]
    flops = found.forward_flops(whole)
    assert flops is not None
    assert found.forward_flops(sharded) == pytest.approx(flops / 4)
    assert found.forward_flops(shared) == pytest.approx(flops / 4)
    rate = found.flops_per_s(whole)
    assert rate == pytest.approx(3 * flops / (whole.forward_s + whole.backward_s))
    assert width_text(whole) == "tp 1"


def test_a_floor_far_below_is_told_in_words() -> None:
    profile = samples.cpu()
    floor_s = profile.constant("host_block_forward_s")
    assert floor_s is not None
    figures = [layer.figures[0] for layer in built(profile).layers if layer.title.startswith("Block")]
    assert all(format_seconds(floor_s) in figure.caption for figure in figures)
    drawn = [layer.figures[0] for layer in built(samples.rich()).layers if layer.title.endswith("bf16")]
    assert any(item.title == "host floor of a small block" for figure in drawn for item in figure.legend)


def test_fitted_constants_are_drawn_over_their_usual_values() -> None:
    profile = samples.shipped()["a100-published-runs"]
    page = built(profile)
    assert page.moved is not None and not page.layers and not page.comms
    scopes = sum(len(row.values) for row in page.constants)
    assert scopes == len(profile.constants)
    assert built(samples.cpu()).moved is None


def test_blocks_that_runs_tell_of_are_listed_by_scope() -> None:
    shape = BlockShape(
        device="a100-sxm-80gb", precision=Precision.BF16, recompute=Recompute.FULL, tokens=4096.0, seq=8192,
        kernel=AttentionKernel.FLASH, compiled=False, routed=True, tp=2, cp=4, width=5120.4,
    )  # fmt: skip
    told = [
        BlockResidual(shape=dataclasses.replace(shape, tp=tp), log_ratio=math.log(ratio), weight=1.5)
        for tp, ratio in ((4, 1.25), (2, 0.9))
    ]
    residuals = BlockResiduals(
        spread=0.1, noise=0.02, told=tuple(told), engine="megatron", network="hdr200x8"
    )
    silent = dataclasses.replace(residuals, told=(), framework="NeMo")
    page = built(dataclasses.replace(samples.shipped()["a100-published-runs"], residuals=(residuals, silent)))
    (shown,) = page.blocks
    assert shown.scope == "megatron on hdr200x8" and "2 block shapes" in page.headline
    assert shown.table.rows[0] == (
        "a100-sxm-80gb", "5,120", "8,192", "tp2 cp4", "4,096", "full", "bf16, flash, experts", "0.906", "1.5",
    )  # fmt: skip
    ratio = Residuals(residuals).ratio
    assert [float(row[-2]) for row in shown.table.rows] == pytest.approx(
        [ratio(told[1].shape), ratio(told[0].shape)], abs=1e-3
    )
    assert not built(samples.cpu()).blocks


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.2), (3e-4, 0.2), (1, 1e9), (4.1, 4.2)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    values = ticks.log_ticks(low, high)
    assert values == sorted(values) and all(low <= value <= high for value in values)
    assert len(values) <= max(ticks.MOST_TICKS, high / low > 1e8 and 10)
    powers = ticks.power_ticks(low * 1000, high * 1000)
    assert len(powers) <= ticks.MOST_TICKS and all(low * 1000 <= value <= high * 1000 for value in powers)


def test_every_operator_is_drawn_and_told() -> None:
    profile = samples.rich()
    page = built(profile)
    titles = [figure.title for figure in page.rates]
    assert titles[:2] == ["Matrix products, forward", "Matrix products, backward"]
    assert {"Attention, forward", "Between the products", "Embedding and routing", "Copies"} <= set(titles)
    rows = [row for figure in page.rates if figure.table for row in figure.table.rows]
    assert len(rows) == len(profile.rates)
    assert not built(samples.cpu()).rates


def test_rates_of_operators_follow_from_their_sizes() -> None:
    gemm = next(s for s in samples.rates() if s.kind is OperatorKind.GEMM)
    m, n, k = gemm.dims
    assert rate_flops(gemm) == 2 * m * n * k
    best = {row[0]: row for row in best_rates(samples.rates()).rows}
    fastest = max(
        (s for s in samples.rates() if s.kind is OperatorKind.GEMM),
        key=lambda s: math.prod(s.dims) / s.forward_s,
    )
    assert best["gemm bf16"][2] == format_si(2 * math.prod(fastest.dims) / fastest.forward_s, "FLOP/s")
    assert best["copy bf16"][2].endswith("B/s") and best["add bf16"][2].endswith("values/s")
    copies = next(figure for figure in built(samples.rich()).rates if figure.title == "Copies")
    assert len(copies.legend) == 3
