"""Conversations: tokens and trained tokens are those of transformers, and every fault has its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from planner.cli import cli
from planner.foundation.errors import InputError
from runtime.train.data.chat import CHATML, TrainOn, choose_template
from runtime.train.data.documents import Columns
from runtime.train.data.prepare import DataOptions, TokenData, data_summary, open_data, prepare_data

SPECIAL = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|header|>",
    "<|/header|>",
    "<|eot|>",
    "[INST]",
    "[/INST]",
)
"""Control tokens of three kinds of templates; the second one ends a document."""

LLAMA_3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\n" }}
{{- "Today Date: 26 Jul 2024\\n\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] | trim + '<|eot|>' }}{% endgeneration %}
    {%- else %}{{- message['content'] | trim + '<|eot|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}{% generation %}{{- " " + message["content"] | trim + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {"llama-3": LLAMA_3, "chatml": CHATML, "mistral": MISTRAL}
SYSTEM = {"role": "system", "content": "Be short — kürzer geht's nicht."}
TURNS = [
    {"role": "user", "content": "  What is 2+2?\n"},
    {"role": "assistant", "content": "Four, \u2603 that is. "},
    {"role": "user", "content": "And <|im_end|> 3 + 3?"},
    {"role": "assistant", "content": "Six"},
]
CONVERSATIONS = [TURNS, [SYSTEM, *TURNS], TURNS[:2], [SYSTEM, TURNS[0]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with the control tokens, and its configuration."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator([json.dumps(CONVERSATIONS), "Today Date: system user assistant"] * 3, trainer)
    model.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save(str(folder / "tokenizer.json"))
    write_config(folder)
    return folder


def write_config(folder: Path, **more: Any) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def with_template(folder: Path, where: Path, text: str) -> Path:
    """The tokenizer with a template of its own."""
    where.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (where / name).write_bytes((folder / name).read_bytes())
    (where / "chat_template.jinja").write_text(text)
    return where


def load(path: Path, tokenizer: Path | str, key: str = "messages", train_on: str = "assistant") -> TokenData:
    options = DataOptions(
        data=(str(path),),
        tokenizer=str(tokenizer),
        columns=Columns(messages=key, train_on=TrainOn(train_on)),
    )
    return open_data(prepare_data(options, vocab=512, cache=path.parent / "cache"))


def write_lines(path: Path, conversations: list[Any] = CONVERSATIONS, key: str = "messages") -> Path:
    path.write_text("".join(json.dumps({"id": 1, key: turns}) + "\n" for turns in conversations))
    return path


def expected(folder: Path, conversations: list[Any], template: str) -> list[tuple[int, int]]:
    """By transformers: the tokens of each conversation, then the end-of-text token where it is not there."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )
    found: list[tuple[int, int]] = []
    for turns in conversations:
        out = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        found += zip(out["input_ids"], out["assistant_masks"], strict=True)
        if found[-1][0] != theirs.eos_token_id:
            found.append((theirs.eos_token_id, found[-1][1]))
    return found


def pairs(data: TokenData) -> list[tuple[int, int]]:
    assert data.mask is not None
    return list(zip(data.tokens.tolist(), data.mask.tolist(), strict=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_trained_tokens_are_those_of_transformers(name: str, folder: Path, tmp_path: Path) -> None:
    named = with_template(folder, tmp_path / "t", TEMPLATES[name])
    data = load(write_lines(tmp_path / "a.jsonl"), named)
    assert pairs(data) == expected(folder, CONVERSATIONS, TEMPLATES[name])
    assert 0 < data.index.trained_tokens < data.index.tokens
    assert f"chat template: {named / 'chat_template.jinja'}" in data_summary(data.index)


def test_prefixes_find_what_generation_blocks_enclose(folder: Path, tmp_path: Path) -> None:
    """Without blocks, a turn is trained on to its end, the newline after it included."""
    plain = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    enclosed = CHATML.replace(
        "{{- content + '<|im_end|>' -}}{%- endgeneration -%}",
        "{{- content + '<|im_end|>\n' -}}{%- endgeneration -%}",
    ).replace("{{- '\n' -}}", "{%- if message.role != 'assistant' -%}{{- '\n' -}}{%- endif -%}")
    assert "generation -" not in plain and enclosed != CHATML
    named = with_template(folder, tmp_path / "t", plain)
    data = load(write_lines(tmp_path / "a.jsonl"), named)
    assert pairs(data) == expected(folder, CONVERSATIONS, enclosed)


def test_all_tokens_are_trained_on_where_asked_and_the_cache_knows(folder: Path, tmp_path: Path) -> None:
    named = with_template(folder, tmp_path / "t", MISTRAL)
    path = write_lines(tmp_path / "a.jsonl")
    some, whole = load(path, named), load(path, named, train_on="all")
    assert whole.mask is None and whole.index.trained_tokens == whole.index.tokens
    assert whole.tokens.tolist() == some.tokens.tolist()
    (named / "chat_template.jinja").write_text(LLAMA_3)
    other = load(path, named)
    write_config(named, bos_token="<|eot|>")
    digests = {data.index.digest for data in (some, whole, other, load(path, named))}
    assert len(digests) == 4, "choice, template and special tokens make other data"


def test_every_form_of_a_conversation_is_the_same(folder: Path, tmp_path: Path) -> None:
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    named = with_template(folder, tmp_path / "t", CHATML)
    first = load(write_lines(tmp_path / "a.jsonl"), named)
    sharegpt = [
        [{"from": speakers[m["role"]], "value": m["content"]} for m in turns] for turns in CONVERSATIONS
    ]
    second = load(write_lines(tmp_path / "b.jsonl", sharegpt, "conversations"), named, "conversations")
    parts = [
        [{**m, "content": [{"type": "text", "text": m["content"]}], "name": None} for m in turns]
        for turns in CONVERSATIONS
    ]
    table = pyarrow.Table.from_pylist([{"messages": turns} for turns in parts])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=3)
    third = load(tmp_path / "c.parquet", named)
    assert pairs(first) == pairs(second) == pairs(third)


def test_a_template_that_asks_for_the_day_is_told_the_same_one(folder: Path, tmp_path: Path) -> None:
    named = with_template(folder, tmp_path / "t", "{{ strftime_now('%d %b %Y') }}" + CHATML)
    data = load(write_lines(tmp_path / "a.jsonl"), named)
    model = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert model.decode(data.tokens.tolist()).startswith("26 Jul 2024")


def test_the_template_is_looked_for_in_order_and_named(folder: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl")
    named = with_template(folder, tmp_path / "t", LLAMA_3)
    both = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": MISTRAL}]
    write_config(named, chat_template=both)
    assert choose_template(str(named / "tokenizer.json")).text == LLAMA_3
    (named / "chat_template.jinja").unlink()
    assert choose_template(str(named)).text == MISTRAL
    write_config(named, chat_template=both[:1])
    with pytest.raises(InputError, match="has the templates tool_use, none called default"):
        choose_template(str(named))
    write_config(named)
    data = load(path, named)
    assert pairs(data) == expected(folder, CONVERSATIONS, CHATML)
    assert f"chat template: ChatML, as {named} has none" in data_summary(data.index)
    assert "chat template: ChatML, as bpe has none" in data_summary(load(path, "bpe").index)


REWRITES = """\
{%- for message in messages %}
    {{- message.role + ': ' }}
    {{- message.content if message.role != 'assistant' or loop.last else message.content.split('so ')[-1] }}
{%- endfor %}"""
GOOD = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so a"}]
FAULTS: dict[str, tuple[Any, str, str]] = {
    "empty": ([], CHATML, r"a\.jsonl, line 2: messages: is an empty conversation"),
    "no list": ("x", CHATML, r"line 2: messages: is of type str, not a list of messages"),
    "no message": (["x"], CHATML, r"line 2: messages\[0\]: is of type str, not a message"),
    "no role": ([{"content": "x"}], CHATML, r"messages\[0\]: has no role; its keys are 'content'"),
    "null role": ([{"role": None, "content": "x"}], CHATML, r"messages\[0\]: has no role"),
    "speaker": ([{"from": "me", "value": "x"}], CHATML, r"\[0\]\.from: is 'me'\. Legal here: human, user"),
    "no value": ([{"from": "gpt"}], CHATML, r"\[0\]\.value: is not there"),
    "no content": ([{"role": "user"}], CHATML, r"\[0\]\.content: is not there"),
    "content": ([{"role": "user", "content": 5}], CHATML, r"\[0\]\.content: is of type int"),
    "refused": ([*GOOD, GOOD[1]], MISTRAL, r"line 2: messages: .* cannot write this: roles must alternate"),
    "fails": (GOOD, "{{ messages[0].content + 1 }}", r"line 2: messages: .* cannot write this"),
    "undefined": (GOOD, "{{ absent.text }}", r"line 2: .*'absent' is undefined"),
    "sandbox": (GOOD, "{{ messages.__class__.__mro__ }}", r"line 2: .*attribute '__class__' .* is unsafe"),
    "changes": (GOOD, "{{ messages.append(1) }}", r"line 2: .*(unsafe|not safely callable)"),
    "tools": ([{"role": "assistant", "tool_calls": [{}]}], CHATML, r"line 2: .*no place for tool_calls"),
    "rewrites": (GOOD * 2, REWRITES, r"line 2: messages\[1\]: .* cannot be told.*--train-on all"),
    "mark": ([{"role": "user", "content": "\ufdd0"}], CHATML, r"line 2: messages: holds a noncharacter"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_file_and_line(name: str, folder: Path, tmp_path: Path) -> None:
    turns, template, fault = FAULTS[name]
    named = with_template(folder, tmp_path / "t", template)
    lines = [json.dumps({"messages": GOOD}) + "\n", json.dumps({"messages": turns}) + "\n"]
    (tmp_path / "a.jsonl").write_text("".join(lines[1:] if "line 1" in fault else lines))
    if name in ("fails", "undefined", "sandbox", "changes"):  # already of a good conversation
        fault = fault.replace("line 2", "line 1")
    with pytest.raises(InputError, match=fault):
        load(tmp_path / "a.jsonl", named)
    assert not list((tmp_path / "cache").glob("*")), "nothing half-made is left"


def test_other_faults_name_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    broken = with_template(folder, tmp_path / "t", "line\n{% for m in %}")
    with pytest.raises(InputError, match=r"chat_template\.jinja, line 2: is no template"):
        load(write_lines(tmp_path / "a.jsonl"), broken)
    with pytest.raises(InputError, match=r"no turn of an assistant.*--train-on all"):
        load(write_lines(tmp_path / "b.jsonl", [TURNS[:1]]), folder)
    rows = pyarrow.Table.from_pylist([{"messages": TURNS, "text": "x"}, {"messages": None, "text": "y"}])
    pyarrow.parquet.write_table(rows, tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet, row 1: messages: is null, not a list of messages"):
        load(tmp_path / "c.parquet", folder)
    with pytest.raises(InputError, match=r"text: is of type string, not a list of messages"):
        load(tmp_path / "c.parquet", folder, "text")
    with pytest.raises(InputError, match=r"has no 'body'.*name one of them by --messages-key"):
        load(tmp_path / "c.parquet", folder, "body")
    (tmp_path / "d.txt").write_text("plain")
    with pytest.raises(InputError, match="is plain text, which has no conversations"):
        load(tmp_path / "d.txt", folder)
    write_lines(tmp_path / "e.jsonl")
    options = DataOptions(data=(str(tmp_path / "e.jsonl"),), tokenizer="byte")
    with pytest.raises(InputError, match=r"has no 'text'.*add --messages-key messages"):
        prepare_data(options, vocab=512, cache=tmp_path / "cache")
    with pytest.raises(InputError, match=r"--train-on: is given without.*\n?.*") as caught:
        Columns(train_on=TrainOn.ALL, prompt="p").check()
    assert "--prompt-key, --completion-key: only one" in str(caught.value), "all problems at once"
    with pytest.raises(InputError, match="--messages-key: is given with --prompt-key"):
        Columns(messages="m", prompt="p", completion="c").check()


def test_the_command_says_what_it_takes() -> None:
    out = " ".join(CliRunner().invoke(cli, ["train", "--help"]).output.split())
    assert "--messages-key KEY" in out and "--train-on [assistant|all]" in out
