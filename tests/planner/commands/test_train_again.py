"""What a launch of `plan train` was told comes back, through options.json, as words that tell it again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from planner.commands.running.train import _data_options, train
from planner.commands.running.train_again import ONCE, SET_HERE, resume_words, told_at_launch
from planner.foundation.decode import to_json
from planner.strategy.strategy import Degrees
from runtime.train.options import TrainOptions
from tests.plans import make_plan, tiny_llama

CHATS = (
    *("--messages-key", "turns", "--train-on", "all", "--document-mask", "--data", "chats.jsonl:2"),
    *("--data", "more.jsonl", "--tokenizer", "byte", "--end-of-text", "<eot>", "--checkpoint-every", "5"),
)
PAIRS = (
    *("--prompt-key", "question", "--completion-key", "answer", "--no-compile", "--lr", "0.01"),
    *("--sync-checkpoints", "--log", "wandb", "--log", "mlflow", "--data-cache", "cache", "--any-device"),
)
REST = (
    *("--text-key", "body", "--compile", "--keep", "3", "--seed", "4", "--min-lr-ratio", "0.2"),
    *("--warmup", "3", "--decay-steps", "9", "--weight-decay", "0.3", "--clip", "2.0", "--lora-alpha", "8.0"),
    *("--hang-timeout", "50.0"),
)
ALL = (CHATS, PAIRS, REST)


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters that click reads from words, but those of one launch."""
    params = train.make_context("train", words).params
    return {name: value for name, value in params.items() if name not in SET_HERE | ONCE}


@pytest.mark.parametrize("flags", ALL, ids=["chats", "pairs", "rest"])
def test_a_launch_is_told_again_as_it_was(flags: tuple[str, ...], tmp_path: Path) -> None:
    asked = parsed(["plan.json", *flags])
    given = {name: value for name, value in asked.items() if name in _fields() or name in _of_data()}
    options = TrainOptions(steps=9, run_dir="run", data=_data_options(given), **given)
    told = told_at_launch(json.loads(to_json(options)), tmp_path)
    words = resume_words(make_plan(tiny_llama(), Degrees()), "plan.json", tmp_path, "9", told, resume=True)
    assert words[:2] == ["plan", "train"]
    assert parsed(words[2:]) == asked


def test_every_flag_is_among_those_told() -> None:
    said = {option for flags in ALL for option in flags if option.startswith("--")}
    missing = [
        option.name
        for option in train.params
        if option.name not in SET_HERE | ONCE | {"hf_config"}
        and not said & {*option.opts, *option.secondary_opts}
    ]
    assert missing == []


def _fields() -> set[str]:
    return {field.name for field in dataclasses.fields(TrainOptions)}


def _of_data() -> set[str]:
    keys = ("text", "prompt", "completion", "messages")
    return {"tokenizer", "end_of_text", "train_on", *(f"{name}_key" for name in keys)}
