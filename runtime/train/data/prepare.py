"""From what `--data` names to a prepared data set: documents, tokens, index.

Documents are packed: one after another, each ended by the end-of-text token, and cut into samples of equal
length. Where each ends is kept, for attention that stops there; otherwise it does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from planner.foundation.decode import digest, to_json, write_atomic
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from runtime.train.data.chat_template import ChatTemplate, choose_template
from runtime.train.data.documents import Columns, documents, needs_pyarrow
from runtime.train.data.encode import encoded
from runtime.train.data.index import (
    DATA_SCHEMA,
    DOCUMENTS,
    MASK,
    TOKENS,
    DataIndex,
    DataPart,
    SourceText,
    describe_file,
    open_data,
)
from runtime.train.data.sources import DataFile, DataSource, find_sources, split_weight
from runtime.train.data.tokenizer import Tokenizer, TokenizerChoice, choose_tokenizer, make_tokenizer
from runtime.train.packages import require_package

TRAINING_CHARACTERS = 1 << 28
"""Byte pairs are learned from so much of the text at most: more changes few merges and takes memory."""


@frozen
class DataOptions:
    """What `plan train` is told of its data: sources as `PATH[:WEIGHT]`, the tokenizer, and the columns."""

    data: tuple[str, ...] = ()
    tokenizer: str = "bpe"
    end_of_text: str | None = None
    columns: Columns = Columns()


def prepare_data(options: DataOptions, *, vocab: int, cache: Path, borders: bool = False) -> Path:
    """The index of the tokenized data set, made in the folder `cache` if it is not there already, or if the
    `borders` of its documents are asked for and not there.

    Raises InputError where data is missing, empty or broken, where the tokenizer does not fit the
    vocabulary, or where the disk is full.
    """
    columns = options.columns
    columns.check()
    choice = choose_tokenizer(options.tokenizer, vocab, options.end_of_text)
    template = None if columns.messages is None else choose_template(options.tokenizer)
    sources = find_sources(options.data)
    parts = _parts(sources)
    files = [file for _, own in parts for file in own]
    if needs_pyarrow(files):
        require_package("pyarrow", "data", f"reading {files[0].name}")
    described = tuple(describe_file(Path(file.path), file.name) for file in files)
    work = _Work(parts, described, choice, columns, template, vocab)
    index_path = cache / f"{work.digest[:16]}.json"
    if not _usable(index_path, work.digest, borders):
        _build(work, index_path)
    return index_path


def data_weights(options: DataOptions) -> tuple[float, ...]:
    """The weights of the parts of the data that `prepare_data` makes; none where there is one part."""
    weights = [split_weight(text)[1] for text in options.data]
    return tuple(w for w in weights if w is not None) if len(weights) > 1 else ()


Parts = list[tuple[str, tuple[DataFile, ...]]]


def _parts(sources: tuple[DataSource, ...]) -> Parts:
    """Sources with weights are read apart; without, all of them are one part."""
    if len(sources) > 1 and sources[0].weight is not None:
        return [(source.name, source.files) for source in sources]
    return [(sources[0].name, tuple(file for source in sources for file in source.files))]


def _usable(index_path: Path, digest: str, borders: bool) -> bool:
    """Whether a whole data set of this digest lies in the cache; a damaged one is made again."""
    try:
        data = open_data(index_path)
    except InputError:
        return False
    return data.index.digest == digest and not (borders and data.documents is None)


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be made."""

    parts: Parts
    described: tuple[SourceText, ...]
    choice: TokenizerChoice
    columns: Columns
    template: ChatTemplate | None
    vocab: int

    @property
    def token_bytes(self) -> int:
        return 2 if self.vocab <= 1 << 16 else 4

    @property
    def digest(self) -> str:
        """Tells apart whatever makes other tokens, or trains on others."""
        counts = [len(files) for _, files in self.parts]
        facts = [DATA_SCHEMA, self.choice.digest, self.vocab, *self.columns.names, counts]
        if self.template is not None:
            facts += [digest([self.template.text, self.template.tokens]), self.columns.masked]
        lines = [*map(str, facts), *(f"{source.sha256} {source.bytes}" for source in self.described)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _build(work: _Work, index_path: Path) -> None:
    stem = index_path.with_suffix("")
    suffixes = (TOKENS, DOCUMENTS, *((MASK,) if work.columns.masked else ()))
    temporary = {suffix: stem.with_name(f".{stem.name}.{os.getpid()}{suffix}.tmp") for suffix in suffixes}
    try:
        index_path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            handles: dict[str, BinaryIO] = {
                suffix: stack.enter_context(path.open("wb")) for suffix, path in temporary.items()
            }
            tokenizer = make_tokenizer(work.choice, work.vocab, _training_text(work))
            written = _write(work, tokenizer, handles)
        for suffix, path in temporary.items():
            path.replace(stem.with_suffix(suffix))
    except OSError as error:
        raise InputError(
            Problem(where=str(index_path.parent), fault=f"cannot be written: {error.strerror}.")
        ) from None
    finally:
        if index_path.parent.is_dir():
            for path in temporary.values():
                path.unlink(missing_ok=True)
    write_atomic(stem.with_suffix(".tokenizer.json"), tokenizer.model.to_str())
    write_atomic(index_path, to_json(_index(work, written)))


def _index(work: _Work, written: _Written) -> DataIndex:
    return DataIndex(
        schema_version=DATA_SCHEMA,
        digest=work.digest,
        tokenizer=work.choice.kind,
        tokenizer_digest=hashlib.sha256(work.choice.digest.encode()).hexdigest(),
        vocab=work.vocab,
        token_bytes=work.token_bytes,
        tokens=sum(written.parts),
        trained_tokens=written.trained,
        parts=tuple(
            DataPart(name=name, tokens=tokens)
            for (name, _), tokens in zip(work.parts, written.parts, strict=True)
        ),
        sha256=written.sha256[TOKENS],
        mask_sha256=written.sha256.get(MASK),
        sources=work.described,
        template=None if work.template is None else work.template.source,
        documents=written.documents,
        documents_sha256=written.sha256[DOCUMENTS],
    )


def _training_text(work: _Work) -> Iterator[str]:
    """The first TRAINING_CHARACTERS of the text, in pieces."""
    left = TRAINING_CHARACTERS
    for _, files in work.parts:
        for file in files:
            for text, _ in itertools.chain.from_iterable(documents(file, work.columns, work.template)):
                yield text
                left -= len(text)
                if left <= 0:
                    return


class _Output:
    """A file that is written, and the digest of what was."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self._digest = handle, hashlib.sha256()

    def write(self, block: bytes) -> None:
        self._handle.write(block)
        self._digest.update(block)

    def finish(self) -> str:
        """Leaves all of it on the disk; its digest."""
        self._handle.flush()
        os.fsync(self._handle.fileno())
        return self._digest.hexdigest()


@dataclass(slots=True)
class _Written:
    """What was written: tokens of each part, and digests by suffix."""

    parts: list[int] = field(default_factory=list)
    trained: int = 0
    documents: int = 0
    sha256: dict[str, str] = field(default_factory=dict)


def _write(work: _Work, tokenizer: Tokenizer, handles: dict[str, BinaryIO]) -> _Written:
    """Writes the tokens of all parts, which of them are trained on, and where documents end."""
    import numpy as np

    written, dtype = _Written(), np.dtype(f"<u{work.token_bytes}")
    outputs = {suffix: _Output(handle) for suffix, handle in handles.items()}
    total = 0
    for _, files in work.parts:
        first = total
        texts = (document for file in files for document in documents(file, work.columns, work.template))
        for ids, marks, ends in encoded(texts, tokenizer):
            outputs[TOKENS].write(np.asarray(ids, dtype=dtype).tobytes())
            if MASK in outputs:
                outputs[MASK].write(marks)
            total += len(ids)
            written.trained += marks.count(1)
            if ends:
                outputs[DOCUMENTS].write(total.to_bytes(8, "little"))
                written.documents += 1
        written.parts.append(total - first)
    if work.template is not None and not written.trained:
        fault = "holds no turn of an assistant, so nothing would be trained on."
        raise InputError(Problem(where="--data", fault=fault, fix="train on all turns: --train-on all"))
    written.sha256 = {suffix: output.finish() for suffix, output in outputs.items()}
    return written
