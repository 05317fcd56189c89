"""The hash chain of a sequence's blocks: two sequences share a block only if its content is the same for both."""

import hashlib
from array import array
from collections.abc import Sequence

import msgspec

from server.sequence import ScaledAdapter


def chain_seed(merged: str = "") -> bytes:
    """Return the start of a hash chain. Blocks are shared only if the same version is merged into the base model's
    weights: the merged product has other bits than the sum of two products."""
    return reweighted(b"", 0, merged) if merged else b""


def salted(parent: bytes, cache_salt: str, request_salt: str = "") -> bytes:
    """Return the chain for the first block with tokens of a tenant. From there on, blocks are shared only within both
    salts."""
    own = hashlib.sha256(parent + b"salt" + cache_salt.encode()).digest()
    return hashlib.sha256(own + request_salt.encode("utf-8", "surrogatepass")).digest() if request_salt else own


def reweighted(parent: bytes, position: int, merged: str) -> bytes:
    """Return the chain for the block in which a merge or its end, before the token at `position`, changed the
    weights."""
    return hashlib.sha256(parent + msgspec.json.encode(("merged", merged, position))).digest()


def adapted(parent: bytes, adapters: tuple[ScaledAdapter, ...], active_from: int) -> bytes:
    """Return the chain for the first block that the adapters apply to. From there on, blocks are shared only among the
    same versions, scales and `active_from`, because a block's tokens do not determine where the adapters begin."""
    return hashlib.sha256(parent + msgspec.json.encode((sorted(adapters), active_from))).digest()


def block_hash_of(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the hash of a block with these tokens, which is the chain for the next block."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()
