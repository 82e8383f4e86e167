"""A comparison as JSON and as a table of comma-separated values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.sizing.comparison import Answers, Comparison, Option


def option_document(option: Option) -> dict[str, Any]:
    """An option with its plan's degrees as in plan.json, and how many blocks each stage recomputes."""
    from planner.foundation.decode import encode
    from planner.strategy.plan import degrees_document

    document: dict[str, Any] = encode(option)
    strategy = option.plan.strategy
    document["plan"]["strategy"] = degrees_document(strategy.degrees)
    document["plan"]["stages"] = [
        {"layers": [stage.first, stage.end], "recompute": encode(stage.recompute)}
        for stage in strategy.stages
    ]
    document["name"] = option.name
    return document


def comparison_document(found: Comparison) -> dict[str, Any]:
    """The whole comparison; `options` come first, the cheapest first."""
    import dataclasses

    from planner.foundation.decode import encode

    rest: dict[str, Any] = encode(dataclasses.replace(found, options=()))
    del rest["options"]
    return {"options": [option_document(option) for option in found.options], **rest}


def size_document(found: Comparison, answers: Answers) -> dict[str, Any]:
    """The comparison with the options that answer the question, and each offer's standing."""
    named = {
        name: None if option is None else {"name": option.name, "cluster": option.cluster, **_short(option)}
        for name in ("smallest", "cheapest", "soonest")
        for option in (getattr(answers, name),)
    }
    outcomes = [
        {"offer": each.offer, "standing": str(each.standing), "best": each.best.cluster, **_short(each.best)}
        for each in answers.outcomes
    ]
    return {**comparison_document(found), "answers": named, "offers": outcomes}


def _short(option: Option) -> dict[str, Any]:
    return {
        "pricing": str(option.rate.pricing),
        "nodes": option.nodes,
        "devices": option.devices,
        "days": option.days,
        "cost_usd": option.cost_usd,
    }


def options_csv(found: Comparison) -> str:
    """All options, a line each."""
    import pandas as pd

    return str(pd.DataFrame([_row(option) for option in found.options]).to_csv(index=False))


def _row(option: Option) -> dict[str, Any]:
    plan, losses = option.plan, option.losses
    return {
        "cluster": option.cluster,
        "provider": option.provider,
        "instance": option.instance,
        "device": option.device,
        "nodes": option.nodes,
        "devices": option.devices,
        "network": option.network,
        "region": option.region,
        "pricing": str(option.rate.pricing),
        "usd_per_node_hour": option.rate.usd_per_node_hour,
        "price_as_of": option.rate.as_of,
        "price_source": option.rate.source,
        "price_doubtful": option.rate.doubtful,
        "plan": plan.label,
        "verdict": str(plan.verdict),
        "peak_memory_bytes": plan.peak_memory_bytes,
        "memory_limit_bytes": plan.memory_limit_bytes,
        "mfu": plan.mfu,
        "step_time_s": option.step_time_s,
        "days": option.days,
        "days_low": option.days_interval[0],
        "days_high": option.days_interval[1],
        "cost_usd": option.cost_usd,
        "cost_usd_low": None if option.cost_interval_usd is None else option.cost_interval_usd[0],
        "cost_usd_high": None if option.cost_interval_usd is None else option.cost_interval_usd[1],
        "usd_per_billion_tokens": option.usd_per_billion_tokens,
        "goodput": option.goodput,
        "checkpoint_every": None if losses is None else losses.checkpoint_every,
        "energy_kwh": option.energy_kwh,
        "carbon_kg": option.carbon_kg,
        "pareto": option.pareto,
        "meets": option.meets,
    }
