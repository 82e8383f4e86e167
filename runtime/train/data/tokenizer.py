"""How text becomes tokens: a tokenizer.json, byte pairs merged from the text itself, or plain bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from planner.foundation.decode import load_json_object, read_text
from planner.foundation.errors import InputError, Problem

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
"""Byte-level tokens: every text can be written with these alone."""
TOKENIZER_FILE = "tokenizer.json"
USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
"""End-of-text tokens of gpt2, llama 3, llama 2 and mistral, gemma, and others, asked for in this order."""


class TokenizerKind(StrEnum):
    """Byte-pair merges up to the model's vocabulary, plain bytes, or a file."""

    BPE = "bpe"
    BYTE = "byte"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer of the `tokenizers` library, and the id that ends a document, if it has one."""

    model: Any
    end: int | None

    @property
    def size(self) -> int:
        """One above its largest token id."""
        return 1 + max(self.model.get_vocab(with_added_tokens=True).values(), default=-1)


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """What `--tokenizer` names. `digest` tells apart whatever makes other tokens."""

    kind: TokenizerKind
    digest: str
    text: str = ""
    end_of_text: str = END_OF_TEXT


def choose_tokenizer(given: str, vocab: int, end_of_text: str | None) -> TokenizerChoice:
    """The choice that `--tokenizer bpe|byte|PATH` makes for a model of `vocab` tokens.

    Raises InputError where it does not fit the model, or the file is none.
    """
    if given in (TokenizerKind.BPE, TokenizerKind.BYTE):
        if vocab < BYTES:
            raise InputError(
                Problem(
                    where="model.vocab",
                    fault=f"is {vocab}; byte-level tokens need {BYTES}.",
                    legal=f"{BYTES} or more",
                    fix="use a model with a larger vocabulary",
                )
            )
        return TokenizerChoice(kind=TokenizerKind(given), digest=f"{given} {vocab}")
    return _file_choice(Path(given), vocab, end_of_text)


def _file_choice(given: Path, vocab: int, end_of_text: str | None) -> TokenizerChoice:
    path = given / TOKENIZER_FILE if given.is_dir() else given
    if not path.exists():
        raise InputError(
            Problem(
                where=f"--tokenizer {given}",
                fault=f"holds no {TOKENIZER_FILE}." if given.is_dir() else "no such file or folder.",
                legal=f"bpe, byte, a {TOKENIZER_FILE}, or a folder with one",
            )
        )
    text = read_utf8(path)
    tokenizer = _from_text(path, text)
    if tokenizer.size > vocab:
        raise InputError(
            Problem(
                where=f"--tokenizer {given}",
                fault=f"makes token ids up to {tokenizer.size - 1}; the model's vocabulary is {vocab}.",
                legal=f"a tokenizer of at most {vocab} tokens",
                fix=f"take the model's own tokenizer, or plan a model with a vocabulary of {tokenizer.size}",
            )
        )
    end = _end_of_text(given, path, tokenizer.model, end_of_text)
    digest = hashlib.sha256(f"{end}\n{text}".encode()).hexdigest()
    return TokenizerChoice(kind=TokenizerKind.FILE, digest=digest, text=text, end_of_text=end)


def read_utf8(path: Path) -> str:
    """The text of a file. Raises InputError where it is not UTF-8."""
    try:
        return read_text(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(Problem(where=str(path), fault=f"is not UTF-8 text: {error.reason}.")) from None


def _from_text(path: Path, text: str) -> Tokenizer:
    from tokenizers import Tokenizer as Model

    try:
        model = Model.from_str(text)
    except Exception as error:  # the library raises Exception itself
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            Problem(where=str(path), fault=f"is no tokenizer of the tokenizers library: {reason}.")
        ) from None
    model.no_truncation()
    model.no_padding()
    return Tokenizer(model, None)


def _end_of_text(given: Path, path: Path, model: Any, named: str | None) -> str:
    """The token that ends a document: as named, as tokenizer_config.json beside it says, or a usual one."""
    beside = path.parent / "tokenizer_config.json"
    tried = [named] if named is not None else [_configured(beside), *USUAL_ENDS]
    for token in tried:
        if token is not None and model.token_to_id(token) is not None:
            return token
    fault = f"has no token {named!r}." if named is not None else "has none of the usual end-of-text tokens."
    raise InputError(
        Problem(
            where=f"--tokenizer {given}",
            fault=fault,
            legal="a token of the tokenizer",
            fix="name the token that ends a document: --end-of-text TOKEN",
        )
    )


def _configured(path: Path) -> str | None:
    """The end-of-sequence token that a tokenizer_config.json names."""
    if not path.is_file():
        return None
    token = load_json_object(path).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def make_tokenizer(choice: TokenizerChoice, vocab: int, text: Iterator[str]) -> Tokenizer:
    """The tokenizer of a choice; byte pairs are merged from `text`."""
    if choice.kind is TokenizerKind.FILE:
        model = _from_text(Path(TOKENIZER_FILE), choice.text).model
    else:
        model = _train(text, choice.kind, vocab)
    return Tokenizer(model, model.token_to_id(choice.end_of_text))


def _train(text: Iterator[str], kind: TokenizerKind, vocab: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocab` tokens; with kind `byte`, one without merges."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT] if vocab > BYTES else []
    trainer = trainers.BpeTrainer(
        vocab_size=BYTES + len(special) if kind is TokenizerKind.BYTE else vocab,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(iter(()) if kind is TokenizerKind.BYTE else text, trainer)
    return model
