"""Limits on what is stored: of all adapters together, and of the adapters that one API key sees."""

import asyncio

from adapters.errors import NoSpace
from adapters.records import Inspected
from server.api.context import AppContext
from server.api.middleware.auth import Key


async def check_room(context: AppContext, key: Key, name: str, inspected: Inspected) -> None:
    """Raise `NoSpace` if the store may not take this version, or the key not this adapter. Publications at the same
    time may exceed a quota by theirs."""
    check_count(context, key, name)
    if key.max_adapter_bytes:
        await asyncio.to_thread(_check_bytes_of_key, context, key, name, inspected)
    quota = context.config.adapter_store_bytes
    if not quota or inspected.digest in context.registry.store:
        return
    if await asyncio.to_thread(context.registry.stored_bytes) + inspected.nbytes > quota:
        raise NoSpace("The adapters on this server have reached their limit of disk space; delete some first.")


def check_count(context: AppContext, key: Key, name: str) -> None:
    """Raise `NoSpace` if the key may have no further adapter. Those that are still fetched count as well."""
    pending = context.registry.pending
    if not key.max_adapters or name in context.registry or name in pending:
        return
    if len({*_names(context, key), *filter(key.sees, pending)}) >= key.max_adapters:
        raise NoSpace(f"This API key may have {key.max_adapters} adapters and has them; delete one first.")


def _names(context: AppContext, key: Key) -> list[str]:
    if key.adapters is not None:
        return [name for name in key.adapters if name in context.registry]
    return [record.name for record in context.registry.walk()]


def _check_bytes_of_key(context: AppContext, key: Key, name: str, inspected: Inspected) -> None:
    """Versions under several names of the key count once, and earlier versions of a name until they are gone."""
    sizes: dict[str, int] = {}
    for seen in _names(context, key):
        sizes |= context.registry.version_sizes(seen)
    if inspected.digest not in sizes and sum(sizes.values()) + inspected.nbytes > key.max_adapter_bytes:
        raise NoSpace(
            f"The adapters of this API key have reached their limit of {key.max_adapter_bytes} bytes, earlier versions "
            "included; delete some first."
        )
