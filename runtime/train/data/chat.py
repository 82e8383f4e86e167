"""Conversations of a data file: lists of messages, in the two forms that chat data comes in.

Chat templates: from the messages of a conversation to its text, and which of it an assistant wrote.

A template is Jinja2, as in the files of Hugging Face's tokenizers. It is a file of somebody else, so it is
rendered in Jinja's sandbox, which lets it neither reach Python nor change what it is given. It sees what
transformers' `apply_chat_template` shows it: `messages`, `tools` and `documents` (none),
`add_generation_prompt`, the tokenizer's special tokens by name, `raise_exception`, `tojson`, and
`strftime_now`, which tells TEMPLATE_DAY whenever it is asked: the same data gives the same tokens on any day.

What an assistant wrote is what `{% generation %}` encloses, where the template has such blocks. Else it is
found by prefixes: of turn k, what the first k turns have beyond the first k - 1 and the generation prompt.
"""

from __future__ import annotations

import datetime
import json
import re
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.foundation.decode import load_json_object
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from runtime.train.data.tokenizer import TokenizerKind, read_utf8

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.ext import Extension


Message = dict[str, Any]
"""`role`, `content` (text, or parts such as {type, text}), and whatever else a template reads."""

FORMS = "a list of {role, content}, or of {from, value}"
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks by `from`, and the role that chat templates know. Sources: axolotl,
src/axolotl/prompt_strategies/chat_template.py (human, gpt) and sharegpt.py (chatgpt, bing, bard);
LLaMA-Factory, data/README.md (observation)."""


class TrainOn(StrEnum):
    """Which tokens of a conversation are trained on."""

    ASSISTANT = "assistant"
    ALL = "all"


def read_conversation(value: Any, where: str) -> list[Message]:
    """The messages of a conversation, each with a role. Keys without a value are left out.

    Raises InputError, at `where` in the file, for whatever is no conversation.
    """
    if not isinstance(value, list):
        raise _fault(where, f"is of type {type(value).__name__}, not a list of messages.", FORMS)
    if not value:
        raise _fault(where, "is an empty conversation.", "one message or more")
    return [_message(message, f"{where}[{place}]") for place, message in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise _fault(where, f"is of type {type(value).__name__}, not a message.", FORMS)
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _fault(where, f"has no role; its keys are {', '.join(map(repr, message)) or 'none'}.", FORMS)
    if not isinstance(message.get("content"), (str, list)) and "tool_calls" not in message:
        kind = type(message.get("content")).__name__
        fault = f"is of type {kind}." if "content" in message else "is not there."
        raise _fault(f"{where}.content", fault, "text, or a list of {type, text} parts")
    return message


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker, text = message.pop("from"), message.pop("value", None)
    if speaker not in SHAREGPT_ROLES:
        raise _fault(f"{where}.from", f"is {speaker!r}.", ", ".join(SHAREGPT_ROLES))
    if not isinstance(text, str):
        fault = "is not there." if text is None else f"is of type {type(text).__name__}."
        raise _fault(f"{where}.value", fault, "text")
    return {"role": SHAREGPT_ROLES[speaker], "content": text, **message}


def _fault(where: str, fault: str, legal: str) -> InputError:
    return InputError(Problem(where=where, fault=fault, legal=legal))


TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
ASSISTANT = "assistant"
TEMPLATE_DAY = datetime.datetime(2024, 7, 26)
"""The day that Llama 3.2's template writes where it cannot ask for today's."""
BEGIN, END = "\ufdd0", "\ufdd1"
"""Enclose what an assistant wrote while a text is rendered: noncharacters, which no text has (Unicode 16,
chapter 23.7)."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

CHATML = """\
{%- for message in messages -%}
    {%- if message.tool_calls is defined -%}
        {{- raise_exception('ChatML has no place for tool_calls') -}}
    {%- endif -%}
    {%- set content = message.content if message.content is string
        else message.content | map(attribute='text') | join -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- content + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""What stands in for a template that a tokenizer lacks. Source of the format: OpenAI, openai-python v0.28.1,
chatml.md."""

Spans = tuple[tuple[int, int], ...]
"""Characters [begin, end) of a text."""
Trained = bool | Spans
"""Whether a text is trained on; of a conversation, what of it."""


@frozen
class ChatTemplate:
    """The text of a template, where it is from, and the special tokens that it can write, by name."""

    text: str
    source: str
    tokens: tuple[tuple[str, str], ...] = ()

    def render(self, messages: list[Message], train_on: TrainOn, where: str) -> tuple[str, Spans]:
        """The text of a conversation, and what of it is trained on. Raises InputError at `where`."""
        if any(mark in json.dumps(messages, ensure_ascii=False, default=str) for mark in (BEGIN, END)):
            fault = "holds a noncharacter of Unicode (U+FDD0 or U+FDD1), which no text has."
            raise InputError(Problem(where=where, fault=fault, fix="remove it"))
        text, enclosed = _enclosed(self._text(messages, where))
        if train_on is TrainOn.ALL:
            return text, ((0, len(text)),)
        return text, enclosed if GENERATION.search(self.text) else self._turns(messages, text, where)

    def check(self) -> None:
        """Raises InputError where this is no template."""
        from jinja2 import TemplateSyntaxError

        try:
            _compiled(self.text)
        except TemplateSyntaxError as error:
            where, fault = f"{self.source}, line {error.lineno}", f"is no template: {error.message}."
            raise InputError(Problem(where=where, fault=fault)) from None

    def _turns(self, messages: list[Message], whole: str, where: str) -> Spans:
        """What each turn of an assistant added to the text, by prefixes."""
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            head = self._text(messages[:place], where, prompt=True)
            upto = self._text(messages[: place + 1], where)
            if not (upto.startswith(head) and whole.startswith(upto)):
                raise InputError(
                    Problem(
                        where=f"{where}[{place}]",
                        fault=f"the template of {self.source} writes the turns up to this one otherwise when "
                        "others follow, or when it asks for it: what the assistant wrote cannot be told.",
                        fix="put {% generation %} and {% endgeneration %} around the assistant's words in "
                        "the template, or train on whole conversations with --train-on all",
                    )
                )
            spans.append((len(head), len(upto)))
        return tuple(spans)

    def _text(self, messages: list[Message], where: str, *, prompt: bool = False) -> str:
        given = {"tools": None, "documents": None, "add_generation_prompt": prompt, **dict(self.tokens)}
        try:
            return _compiled(self.text).render(messages=messages, **given)
        except Exception as error:  # its expressions are Python's own: they can fail of anything
            reason = " ".join(str(error).split())[:300].rstrip(".")
            turns = f"the first {len(messages)} turns of this" if prompt else "this"
            fault = f"the template of {self.source} cannot write {turns}: {reason}."
            raise InputError(Problem(where=where, fault=fault)) from None


def _enclosed(marked: str) -> tuple[str, Spans]:
    """A text without the marks in it, and what they enclosed."""
    text, spans = "", []
    for place, piece in enumerate(re.split(f"[{BEGIN}{END}]", marked)):
        if place % 2:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, tuple(spans)


@cache
def _compiled(text: str) -> Template:
    """A template in the sandbox. Raises TemplateSyntaxError."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation(), loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": TEMPLATE_DAY.strftime}
    return environment.from_string(text)


@cache
def _generation() -> type[Extension]:
    """Jinja's extension for `{% generation %}`, which encloses what it writes in BEGIN and END."""
    from jinja2 import nodes, parser
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("enclose"), [], [], body).set_lineno(line)

        def enclose(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    return Generation


def choose_template(tokenizer: str) -> ChatTemplate:
    """The template of the tokenizer that `--tokenizer bpe|byte|PATH` names: of its folder the file
    chat_template.jinja, else what tokenizer_config.json has, else ChatML.

    Raises InputError where the files are broken.
    """
    if tokenizer in (TokenizerKind.BPE, TokenizerKind.BYTE):
        return ChatTemplate(text=CHATML, source=f"ChatML, as {tokenizer} has none")
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    path, config_path = folder / TEMPLATE_FILE, folder / CONFIG_FILE
    config = load_json_object(config_path) if config_path.is_file() else {}
    tokens = tuple(sorted(_special_tokens(config)))
    if path.is_file():
        chosen = ChatTemplate(text=read_utf8(path), source=str(path), tokens=tokens)
    elif (text := _configured(config.get("chat_template"), config_path)) is not None:
        chosen = ChatTemplate(text=text, source=str(config_path), tokens=tokens)
    else:
        chosen = ChatTemplate(text=CHATML, source=f"ChatML, as {folder} has none", tokens=tokens)
    chosen.check()
    return chosen


def _configured(found: Any, path: Path) -> str | None:
    """The template of a tokenizer_config.json: a text, or the one called `default` of several."""
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
        if found is None:
            fault = f"has the templates {', '.join(map(str, named)) or 'of no name'}, none called default."
            raise InputError(Problem(where=f"{path}: chat_template", fault=fault))
    if found is None or isinstance(found, str):
        return found
    fault = f"is of type {type(found).__name__}, not text."
    raise InputError(Problem(where=f"{path}: chat_template", fault=fault))


def _special_tokens(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The special tokens that a tokenizer_config.json names, such as bos_token."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    found = []
    for key, value in (named | (extra if isinstance(extra, dict) else {})).items():
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            found.append((key, token))
    return found
