"""How the native runtime cuts a micro-batch's tokens where it projects them onto the vocabulary.

Head and loss are one: for a chunk of tokens at a time logits are formed, their softmax, and from it at once
the gradients of the head's input and weight, so that the logits of all tokens never exist together.
"""

from __future__ import annotations

import math

CHUNK_BYTES = 2**30
"""Most bytes of a chunk's logits in fp32. At 128,256 columns that is 2,093 tokens: large enough that adding
a chunk's part to the weight's gradient (2 c V h bytes moved) is a fifth of its product on an H100."""


def chunk_tokens(tokens: int, columns: int) -> int:
    """Tokens of a chunk, of `tokens` in all and `columns` of the vocabulary; the last has what is left."""
    return min(tokens, max(1, CHUNK_BYTES // (4 * columns)))


def chunk_count(tokens: int, columns: int) -> int:
    """Into how many chunks tokens are cut."""
    return max(1, math.ceil(tokens / max(1, chunk_tokens(tokens, columns))))


def chunk_logits(tokens: float, columns: float) -> float:
    """Logits of a chunk, at most: of whole tokens there may be fewer, by less than one of them."""
    return min(tokens * columns, max(columns, CHUNK_BYTES / 4))
