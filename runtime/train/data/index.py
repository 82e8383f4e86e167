"""A prepared data set on disk, opened for reading.

    KEY.tokens           token ids, little endian, of all sources one after another
    KEY.mask             a byte a token, 1 where it is trained on; only where not all are
    KEY.documents        the place after each document in the tokens, 8 bytes each, little endian
    KEY.tokenizer.json   what made the tokens
    KEY.json             the index, written last

KEY is a digest of the files, the columns, the tokenizer, the vocabulary and, of conversations, the chat
template and what is trained on, so a changed input makes new files and never meets old ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from planner.foundation.decode import load_json
from planner.foundation.errors import InputError, Problem
from planner.foundation.frozen import frozen
from planner.foundation.units import format_bytes
from runtime.train.data.tokenizer import TokenizerKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
