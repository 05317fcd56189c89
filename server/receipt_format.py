"""The format of receipts, which the API writes and `loraplex replay` reads."""

import hashlib
from typing import Any

import msgspec

FORMAT = 1


def digest_of(receipt: dict[str, Any]) -> str:
    """Return the digest of a receipt, whatever digest it states."""
    content = {name: value for name, value in receipt.items() if name != "digest"}
    return f"sha256:{hashlib.sha256(msgspec.json.encode(content, order='sorted')).hexdigest()}"
