"""How the native runtime cuts a micro-batch's tokens where it projects them onto the vocabulary.

Head and loss are one: for a chunk of tokens at a time logits are formed, their softmax, and from it at once
the gradients of the head's input and weight, so that the logits of all tokens never exist together.
"""

from __future__ import annotations

import math

CHUNK_BYTES = 2**30
"""Most bytes of a chunk's logits in fp32. At 128,256 columns that is 2,093 tokens: large enough that adding
a chunk's part to the weight's gradient (2 c V h bytes moved) is a fifth of its product on an H100."""


def chunk_count(tokens: int, columns: int) -> int:
    """Into how many chunks, equal but for the last, `tokens` are cut for `columns` of the vocabulary."""
    return max(1, math.ceil(tokens * columns * 4 / CHUNK_BYTES))


def chunk_tokens(tokens: int, columns: int) -> int:
    """Tokens of the largest chunk."""
    return math.ceil(tokens / chunk_count(tokens, columns))
