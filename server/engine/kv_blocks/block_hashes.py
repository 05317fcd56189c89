"""The hash chain of a sequence's blocks: two sequences share a block only if its content is the same for both."""

import hashlib
from array import array
from collections.abc import Iterable

import msgspec

from server.request import ScaledAdapter
from server.sequence import Sequence


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


def block_hash_of(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """Return the hash of a block with these tokens, which is the chain for the next block."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


def tokens_of(seq: Sequence, index: int, block_size: int) -> tuple[int, ...]:
    return tuple(seq.token_ids[index * block_size : (index + 1) * block_size])


def extend_hashes(seq: Sequence, num_full: int, block_size: int) -> None:
    """Compute the hashes of the first `num_full` blocks of a sequence, as far as it lacks them."""
    for index in range(len(seq.block_hashes), num_full):
        seq.block_hashes.append(block_hash_of(chain_of(seq, index, block_size), tokens_of(seq, index, block_size)))


def chain_of(seq: Sequence, index: int, block_size: int) -> bytes:
    """Return what the content of a sequence's block depends on, besides the tokens in it."""
    parent = seq.block_hashes[index - 1] if index else chain_seed(seq.chain_merged)
    if index == seq.num_virtual_tokens // block_size:  # blocks of virtual tokens alone are of all tenants
        parent = salted(parent, seq.cache_salt, seq.request_salt)
    for position, merged in seq.weight_changes:
        if position // block_size == index:
            parent = reweighted(parent, position, merged)
    if seq.adapters and index == seq.active_from // block_size:
        parent = adapted(parent, seq.adapters, seq.active_from)
    return parent
