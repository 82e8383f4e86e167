"""Conversations of a data file: lists of messages, in the two forms that chat data comes in."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from planner.foundation.errors import InputError, Problem

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
