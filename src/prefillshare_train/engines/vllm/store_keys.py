"""What a block of K/V is filed under: everything that its content follows from.

A block's K/V depend on the base, its dtypes and geometry (the namespace), and on every token from
the prompt's start to the block's end. They do not depend on who asks: no adapter's name is in a
key, which is how decoders find what the base wrote.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def block_keys(
    namespace: str, tokens: Sequence[int], block_size: int, salt: str | None = None
) -> list[str]:
    """Keys of a prompt's blocks, each chained to those before it.

    Args:
        namespace: `PrefillId.digest`, with whatever else shapes a block.
        tokens: the prompt's token ids.
        block_size: tokens in a block; the last one may hold fewer and has a key all the same.
        salt: the request's `cache_salt`; requests with different ones share nothing.

    Returns:
        One key of 64 hexadecimal digits for each block, the partial one at the end included.
    """
    parent = hashlib.sha256(f"{namespace}\n{salt or ''}".encode()).digest()
    keys = []
    for start in range(0, len(tokens), block_size):
        # 64 bits a token: no two lists of ids, of whatever lengths, have the same bytes.
        ids = array("q", tokens[start : start + block_size]).tobytes()
        parent = hashlib.sha256(parent + ids).digest()
        keys.append(parent.hex())
    return keys
