"""From what `--data` names to a prepared data set: documents, tokens, index.

Documents are packed: one after another, each ended by the end-of-text token, and cut into samples of equal
length. Where each ends is kept, for attention that stops there; otherwise it does not.

From documents to tokens, in batches that the tokenizer spreads over its threads.

A prepared data set on disk, opened for reading.

    KEY.tokens           token ids, little endian, of all sources one after another
    KEY.mask             a byte a token, 1 where it is trained on; only where not all are
    KEY.documents        the place after each document in the tokens, 8 bytes each, little endian
    KEY.tokenizer.json   what made the tokens
    KEY.json             the index, written last

KEY is a digest of the files, the columns, the tokenizer, the vocabulary and, of conversations, the chat
template and what is trained on, so a changed input makes new files and never meets old ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from planner.foundation.decode import digest, load_json, to_json, write_atomic
from planner.foundation.errors import InputError, Problem, require_package
from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes
from runtime.train.data.chat import ChatTemplate, Trained, choose_template
from runtime.train.data.documents import (
    Columns,
    DataFile,
    DataSource,
    Piece,
    documents,
    find_sources,
    needs_pyarrow,
    split_weight,
)
from runtime.train.data.tokenizer import (
    Tokenizer,
    TokenizerChoice,
    TokenizerKind,
    choose_tokenizer,
    make_tokenizer,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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


DATA_SCHEMA = 2
TOKENS, MASK, DOCUMENTS = ".tokens", ".mask", ".documents"
"""The files beside an index."""
BLOCK_BYTES = 1 << 20


@frozen
class SourceText:
    """One file that went into a data set."""

    name: str
    bytes: int
    sha256: str


@frozen
class DataPart:
    """The tokens of sources that are read as one, in place after those of the part before."""

    name: str
    tokens: int


@frozen
class DataIndex:
    """The index of a prepared data set.

    `digest` covers files, columns, tokenizer, vocabulary and chat template; `tokenizer_digest` the tokenizer
    alone. `template` says where the template of conversations is from. `documents` is how many there are;
    indexes of releases that did not count them have None.
    """

    schema_version: int
    digest: str
    tokenizer: TokenizerKind
    tokenizer_digest: str
    vocab: int
    token_bytes: int
    tokens: int
    trained_tokens: int
    parts: tuple[DataPart, ...]
    sha256: str
    mask_sha256: str | None
    sources: tuple[SourceText, ...]
    template: str | None = None
    documents: int | None = None
    documents_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class TokenData:
    """A data set open for reading: read-only memory maps of its tokens, of which are trained on (None: all),
    and of the place after each document (None: not known)."""

    index: DataIndex
    tokens: NDArray[np.unsignedinteger]
    mask: NDArray[np.uint8] | None
    documents: NDArray[np.unsignedinteger] | None = None

    def samples(self, seq: int) -> tuple[int, ...]:
        """Samples of `seq` + 1 tokens in each part; neighbours share one token, the last target."""
        return tuple(max(0, (part.tokens - 1) // seq) for part in self.index.parts)


def describe_file(file: Path, name: str) -> SourceText:
    """Size and content of a file. Raises InputError where it cannot be read."""
    digest, size = hashlib.sha256(), 0
    try:
        with file.open("rb") as handle:
            while block := handle.read(BLOCK_BYTES):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise InputError(Problem(where=str(file), fault=f"cannot be read: {error.strerror}.")) from None
    return SourceText(name=name, bytes=size, sha256=digest.hexdigest())


def open_data(index_path: Path, *, verify: bool = True) -> TokenData:
    """The data set of an index. Raises InputError where one of its files is cut short or altered.

    Without `verify` only the lengths are compared: one process of a machine reads the whole files, the
    others trust it.
    """
    import numpy as np

    index = load_json(index_path, DataIndex)
    kinds = [(TOKENS, f"<u{index.token_bytes}", index.tokens, index.sha256)]
    if index.mask_sha256 is not None:
        kinds.append((MASK, "<u1", index.tokens, index.mask_sha256))
    if index.documents is not None and index.documents_sha256 is not None:
        kinds.append((DOCUMENTS, "<u8", index.documents, index.documents_sha256))
    problems: list[Problem] = []
    for suffix, kind, count, sha256 in kinds:
        path = index_path.with_suffix(suffix)
        problems += _problems(path, index_path, count * np.dtype(kind).itemsize, sha256, verify)
    if problems:
        raise InputError(*problems)
    if not index.tokens:
        where = str(index_path.with_suffix(TOKENS))
        raise InputError(Problem(where=where, fault="holds no tokens: the text is empty."))
    maps = {
        suffix: np.memmap(index_path.with_suffix(suffix), dtype=np.dtype(kind), mode="r")
        for suffix, kind, _, _ in kinds
    }
    return TokenData(index, maps[TOKENS], maps.get(MASK), maps.get(DOCUMENTS))


def _problems(path: Path, index_path: Path, size: int, sha256: str, verify: bool) -> Iterator[Problem]:
    found = path.stat().st_size if path.exists() else 0
    cure = f"delete {path} and {index_path.name}; they are made again from the text"
    if found != size:
        fault = f"has {found} bytes, its index {size}: it is cut short or altered."
        yield Problem(where=str(path), fault=fault, fix=cure)
    elif verify and describe_file(path, path.name).sha256 != sha256:
        yield Problem(where=str(path), fault="does not match its checksum.", fix=cure)


def data_summary(index: DataIndex, *, document_mask: bool = False) -> str:
    """One line for people: `1 file, 669 KiB, 190,000 tokens (bpe, vocabulary 4096)`."""
    size = format_bytes(sum(source.bytes for source in index.sources))
    files = f"{len(index.sources)} file" + ("s" if len(index.sources) != 1 else "")
    trained = "" if index.mask_sha256 is None else f", {index.trained_tokens:,} of them trained on"
    chat = "" if index.template is None else f", chat template: {index.template}"
    tokenizer = f"{index.tokenizer}, vocabulary {index.vocab}{chat}"
    within = f", attention within documents ({index.documents:,})" if document_mask else ""
    return f"{files}, {size}, {index.tokens:,} tokens{trained} ({tokenizer}){within}"


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
