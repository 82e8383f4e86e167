"""Quantities as text: parsed exactly, refused with their legal units, printed in words."""

from __future__ import annotations

import pytest

from planner.foundation.errors import InputError
from planner.foundation.units import (
    format_bytes,
    format_count,
    format_days,
    format_percent,
    format_seconds,
    format_short_usd,
    format_signed_percent,
    format_usd,
    parse_bytes,
    parse_bytes_per_s,
    parse_count,
    parse_duration,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72GiB", 72 * 2**30),
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("0B", 0),
        ("12e3KB", 12_000_000),
    ],
)
def test_bytes_are_parsed_with_binary_and_decimal_units_apart(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2T", 2 * 10**12), ("1.5B", 1_500_000_000), ("300000", 300_000), ("1e9", 10**9), ("0.5K", 500)],
)
def test_counts_are_parsed(text: str, expected: int) -> None:
    assert parse_count(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("30d", 2_592_000.0), ("12h", 43_200.0), ("90s", 90.0)])
def test_durations_are_parsed(text: str, expected: float) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "72", "-1GiB", "72GiBs", "nanGiB", "infGiB", "1_0GiB", "0x10GB", "1 2GB", "٣GB"]
)
def test_a_bad_size_names_the_flag_and_the_units(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_bytes(text, "--memory-limit")
    (problem,) = caught.value.problems
    assert problem.where == "--memory-limit"
    assert "GiB" in problem.legal and "GIB" not in problem.legal


@pytest.mark.parametrize("text", ["", "many", "-5", "5X", "1e999T", "9" * 99])
def test_a_bad_or_infinite_count_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_count(text)


def test_words_for_people() -> None:
    assert format_bytes(52.2 * 2**30) == "52.2 GiB"
    assert format_bytes(12) == "12 B"
    assert format_seconds(1.2345) == "1.234 s"
    assert format_seconds(0.0045) == "4.5 ms"
    assert format_seconds(86_400 * 218) == "218 days"
    assert format_count(8_030_261_248) == "8.03B"
    assert format_count(12) == "12"


def test_percentages_and_dollars_have_one_spelling() -> None:
    assert [format_percent(0.0316), format_percent(1.0, 0), format_percent(None)] == ["3.2%", "100%", "-"]
    assert [format_signed_percent(0.0316), format_signed_percent(-0.5, 0)] == ["+3.2%", "-50%"]
    assert format_signed_percent(None) == "-"
    assert [format_usd(usd) for usd in (12.345, 999.99, 123_456.7, -5, None)] == [
        *("$12.35", "$999.99", "$123,457", "-$5.00", "unknown")
    ]
    assert [format_days(days) for days in (0.0421, 4.21, 218.4, 1240)] == ["0.042", "4.2", "218", "1,240"]


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        *((None, "unknown"), (9_994, "$9,994"), (9_996, "$10.0K"), (191_746, "$192K"), (999_499, "$999K")),
        *((999_500, "$1.00M"), (1_742_000, "$1.74M"), (2.5e9, "$2.50B"), (-20_000, "-$20.0K")),
    ],
)
def test_short_dollars_have_three_digits(usd: float | None, text: str) -> None:
    assert format_short_usd(usd) == text


@pytest.mark.parametrize(("text", "rate"), [("40GB/s", 40e9), ("1.5 GiB/s", 1.5 * 2**30), ("7B", 7.0)])
def test_rates_of_bytes(text: str, rate: float) -> None:
    assert parse_bytes_per_s(text, "--storage") == rate


@pytest.mark.parametrize("text", ["fast", "40Gbit/s", "-1GB/s", "/s", ""])
def test_what_is_no_rate_of_bytes_names_its_flag(text: str) -> None:
    with pytest.raises(InputError, match="--storage"):
        parse_bytes_per_s(text, "--storage")
