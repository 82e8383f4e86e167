"""`plan list devices` and `plan show device`: every figure of a device beside its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planner.commands.shared.text import table, wrapped_table

if TYPE_CHECKING:
    from planner.hardware.device_file import DeviceFile

UNVERIFIED = "unverified (from memory)"
DERIVED = "derived: reported memory less 0.75 GiB of driver context"
FORMATS = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp4")
SHOWN_SIZES_MIB = (1, 16, 256)
SHOWN_RANKS = (2, 4, 8)
_LISTED = (
    ("usable_gib", "memory", "usable_gib"),
    ("bandwidth_gb_per_s", "memory", "bandwidth_gb_per_s"),
    ("fp32_tflops", "peak_tflops", "fp32"),
    ("bf16_tflops", "peak_tflops", "bf16"),
    ("fp16_tflops", "peak_tflops", "fp16"),
    ("fp8_tflops", "peak_tflops", "fp8"),
    ("link_gb_per_s", "link", "gb_per_s"),
    ("tdp_w", "power", "tdp_w"),
    ("typical_usd", "price", "typical_usd"),
)
_UNITS = {
    "nominal_gb": "GB", "reported_mib": "MiB", "usable_gib": "GiB", "bandwidth_gb_per_s": "GB/s",
    "gb_per_s": "GB/s one way", "latency_us": "us a ring step", "domain": "devices", "tdp_w": "W",
    "low_usd": "USD", "typical_usd": "USD", "high_usd": "USD", "bf16_gemm_tflops": "TFLOPS",
    "fp32": "TFLOPS", "tf32": "TFLOPS", "bf16": "TFLOPS", "fp16": "TFLOPS", "fp8": "TFLOPS", "fp4": "TFLOPS",
    "share": "of the rate, large collectives",
}  # fmt: skip
_GROUPS = ("memory", "peak_tflops", "measured", "link", "pcie", "power", "price")


def device_rows() -> list[dict[str, Any]]:
    """One row a device, as its file says; `unverified` names the columns that no source was read for."""
    from planner.foundation.decode import load_toml_object
    from planner.hardware.catalog import data_folder, device_names

    folder = data_folder() / "devices"
    return [_row(name, load_toml_object(folder / f"{name}.toml")) for name in device_names()]


def _row(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    figures = {column: facts.get(group, {}).get(key) for column, group, key in _LISTED}
    unverified = [
        column for column, group, key in _LISTED if key in facts.get(group, {}).get("unverified", ())
    ]
    return {
        "name": name,
        "title": facts["title"],
        "vendor": facts["vendor"],
        "year": facts.get("year"),
        **figures,
        "link": facts["link"]["name"],
        "as_of": facts.get("price", {}).get("as_of"),
        "aliases": list(facts.get("aliases", ())),
        "unverified": unverified,
        "sources": list(facts["memory"]["sources"]),
    }


def device_list(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people; figures from memory carry a question mark."""
    header = ["name", "vendor", "GiB", "GB/s", "fp32", "bf16", "fp16", "fp8", "link GB/s", "W", "USD"]
    columns = [column for column, _, _ in _LISTED]
    body = [[row["name"], row["vendor"], *(_marked(row, column) for column in columns)] for row in rows]
    legend = (
        "GiB usable; peaks in dense TFLOPS; link one way; USD typical price of one, late 2026.\n"
        "? from memory, unverified; - unknown or not supported. Sources: plan show device NAME."
    )
    return f"{table(header, body, numbers=range(2, len(header)))}\n\n{legend}"


def _marked(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return "- "
    return f"{value:g}?" if column in row["unverified"] else f"{value:g} "


def show_device(name: str) -> tuple[dict[str, Any], str]:
    """One device: the document for programs, and the text for people."""
    from planner.foundation.decode import encode
    from planner.hardware.catalog import load_device

    facts = load_device(name, "NAME")
    figures = device_figures(facts)
    collectives, products = collective_summary(facts.name), product_summary(facts.name)
    document = {
        **encode(facts.device()),
        "facts": encode(facts),
        "figures": figures,
        "measured_collectives": collectives,
        "measured_products": products,
    }
    parts = [
        _heading(facts),
        wrapped_table(
            ("figure", "value", "source"),
            [(f["figure"], _quantity(f["value"], f["unit"]), f["source"]) for f in figures],
        ),
        _products_text(facts.name, products),
        _collectives_text(facts.name, collectives),
    ]
    parts.append("Keys of the sources: profiles/README.md.")
    return document, "\n\n".join(parts)


def _heading(facts: DeviceFile) -> str:
    kind = [facts.vendor, facts.architecture, facts.compute_capability, facts.form_factor, str(facts.year)]
    lines = [f"{facts.name}: {facts.title}", ", ".join(part for part in kind if part and part != "None")]
    if facts.aliases:
        lines.append(f"also called {', '.join(facts.aliases)}")
    if facts.reported_names:
        lines.append(f"its driver says {', '.join(facts.reported_names)}")
    lines.append(f"between nodes, where --cluster names nothing: {facts.network} (assumed)")
    if facts.unverified:
        lines.append(f"{UNVERIFIED}: {', '.join(facts.unverified)}")
    return "\n".join(lines)


def device_figures(facts: DeviceFile) -> list[dict[str, Any]]:
    """Every number of a device with its unit, its origin and its source.

    Origins: read in the source; memory, so unverified; derived from another figure; unknown.
    """
    from planner.foundation.decode import encode

    rows = []
    for group in _GROUPS:
        values = getattr(facts, group)
        for key, value in encode(values).items() if values else ():
            if key in FORMATS and value is None:
                rows.append(
                    _figure(group, key, None, "unknown", "no source was read; the device may lack it")
                )
            elif isinstance(value, (int, float)):
                rows.append(_figure(group, key, value, *_source(values, group, key)))
    return rows


def _figure(group: str, key: str, value: float | None, origin: str, source: str) -> dict[str, Any]:
    unit = _UNITS.get(key, "")
    return {"figure": f"{group}.{key}", "value": value, "unit": unit, "origin": origin, "source": source}


def _source(values: Any, group: str, key: str) -> tuple[str, str]:
    """Origin and source of a figure: keys with a source of their own name it as `latency: ...`."""
    if key in getattr(values, "unverified", ()):
        return "memory", UNVERIFIED
    if key == "usable_gib":
        return "derived", DERIVED
    own = {"latency_us": "latency: ", "share": "share: ", "domain": "domain "}
    if key in own:
        said = [text.removeprefix(own[key]) for text in values.sources if text.startswith(own[key])]
        if said:
            return "memory" if "from memory" in said[0] else "read", said[0]
    shared = [text for text in values.sources if not text.startswith(tuple(own.values()))]
    date = f", as of {values.as_of}" if group == "price" else ""
    return "read", "; ".join(shared) + date


def _quantity(value: float | None, unit: str) -> str:
    return "unknown" if value is None else f"{value:.10g} {unit}".strip()


def collective_summary(device: str) -> list[dict[str, Any]]:
    """Latency and bus bandwidth over the shipped curves, by op and measured group size."""
    from planner.foundation.units import MIB
    from planner.hardware.measured_tables import curves_of, wire_factor

    curves = curves_of(device)
    rows = []
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all") if curves else ():
        assert curves is not None
        for ranks in (n for n in SHOWN_RANKS if n in curves.ranks(op)):
            rates = {
                f"busbw_{size}mib_gb_per_s": round(
                    wire_factor(op, ranks) * size * MIB / curves.seconds(op, ranks, size * MIB)[0] / 1e9, 2
                )
                for size in SHOWN_SIZES_MIB
            }
            latency_us = round(curves.seconds(op, ranks, 1)[0] * 1e6, 2)
            rows.append({"op": op, "ranks": ranks, "latency_us": latency_us, **rates})
    return rows


def _collectives_text(device: str, rows: Sequence[Mapping[str, Any]]) -> str:
    from planner.hardware import measured_tables as measured

    if not rows:
        refused = [t for t in measured.tables().values() if t.rejected and device in t.products]
        why = f"\nRejected: {refused[0].host};\n{refused[0].rejected}." if refused else ""
        return f"Collectives inside a node: no curve is shipped; the link's rate and share are used.{why}"
    host = measured.tables()[measured.table_of(device, "collectives") or ""].host
    header = ["op", "ranks", "latency us", *(f"{size} MiB" for size in SHOWN_SIZES_MIB)]
    body = [[f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row.values()] for row in rows]
    title = f"Collectives inside a node, bus GB/s by message; AIC, measured on\n{host}:"
    return f"{title}\n{table(header, body)}"


def product_summary(device: str) -> dict[str, Any] | None:
    """The measured table of matrix products that speaks for a device: medians by m and min(n, k)."""
    from planner.foundation.decode import encode
    from planner.hardware import measured_tables as measured

    use = "products" if measured.table_of(device, "products") else "shares"
    name = measured.table_of(device, use)
    if name is None:
        return None
    rows = measured.products(name)
    return {
        "table": name,
        "host": measured.tables()[name].host,
        "own": use == "products",
        "rows": [
            {k: v for k, v in encode(row).items() if k not in ("table", "framework", "version")}
            for row in rows
        ],
        "bf16_floor": measured.tables()[name].bf16_floor,
        "source": f"AIC: GEMM table of {rows[0].framework} {rows[0].version}",
    }


def _products_text(device: str, summary: Mapping[str, Any] | None) -> str:
    if summary is None or not summary["own"]:
        whose = summary["host"] if summary else "the mean of all measured devices"
        return (
            f"Matrix products: no table of {device} is shipped; by shape it is taken to reach the share of\n"
            f"its peak of {whose},\nscaled where measured.bf16_gemm_tflops is known."
        )
    rows = [row for row in summary["rows"] if row["precision"] == "bf16"]
    buckets = sorted({(row["min_nk_from"], row["min_nk_to"]) for row in rows}, key=lambda b: b[0])
    medians = {(row["m"], row["min_nk_from"]): row["median_tflops"] for row in rows}
    header = ["m", *(f"{start}-{end}" if end else f"{start}+" for start, end in buckets)]
    body = [
        [m, *(_whole(medians.get((m, b))) for b, _ in buckets)] for m in sorted({row["m"] for row in rows})
    ]
    title = (
        f"Matrix products (m, k) x (k, n) in bf16, median TFLOP/s by m and min(n, k); {summary['source']}:"
    )
    note = ""
    if summary["bf16_floor"]:
        note = (
            "\nIts host was held back at large products: the cost model takes at least "
            f"{summary['bf16_floor']:.0%} of the best smaller one."
        )
    return f"{title}\n{table(header, body)}{note}"


def _whole(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"
