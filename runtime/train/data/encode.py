"""From documents to tokens, in batches that the tokenizer spreads over its threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from runtime.train.data.chat_template import Trained
from runtime.train.data.documents import Piece
from runtime.train.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 22
"""Text is encoded in batches of about this size."""


class Encoded(NamedTuple):
    """Token ids, a byte for each that is 1 where it is trained on, and whether a document ends there."""

    ids: list[int]
    marks: bytes
    ends: bool = False


def encoded(documents: Iterable[Iterator[Piece]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """The tokens of every piece in order, an end-of-text token after each document that is not empty.

    A document that is trained on in spans, a conversation, gets none where its own last token is one; else it
    is trained on if the token before it is.
    """
    batch: list[tuple[str | None, Trained]] = []
    last = Encoded([], b"")
    size = 0

    def encode() -> Iterator[Encoded]:
        nonlocal last
        texts = [text for text, _ in batch if text is not None]
        found = iter(tokenizer.model.encode_batch(texts, add_special_tokens=False))
        for text, trained in batch:
            if text is None:
                yield _end(tokenizer.end, last, trained)
                continue
            encoding = next(found)
            piece = Encoded(encoding.ids, _marks(encoding, len(text), trained))
            last = piece if piece.ids else last
            yield piece
        batch.clear()

    for document in documents:
        held, of_document = False, True
        for text, trained in document:
            held = held or bool(text)
            of_document = isinstance(trained, bool)
            batch.append((text, trained))
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield from encode()
                size = 0
        if held:
            batch.append((None, of_document or ()))
    yield from encode()


def _end(end: int | None, last: Encoded, trained: Trained) -> Encoded:
    """The end-of-text token after the piece `last`; trained on, or where `trained` are spans as it is."""
    if end is None or (not isinstance(trained, bool) and last.ids[-1:] == [end]):
        return Encoded([], b"", ends=True)
    return Encoded([end], b"\1" if trained is True else last.marks[-1:], ends=True)


def _marks(encoding: Any, length: int, trained: Trained) -> bytes:
    """For each token of a text of `length` characters whether it is trained on: where any of its own is."""
    if isinstance(trained, bool):
        return bytes([trained]) * len(encoding.ids)
    characters = bytearray(length)
    for begin, end in trained:
        characters[begin:end] = b"\1" * (end - begin)
    return bytes(characters.find(1, begin, end) >= 0 for begin, end in encoding.offsets)
