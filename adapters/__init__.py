"""Adapters from upload to matrix product, knowing nothing of HTTP or of the server: what may be served and where its
bytes are (the control plane), and how it gets into a running model (the data plane). Importing this package imports
no torch; `adapters.validation.inspect` and the data plane's modules do.
"""

from adapters.errors import (
    AdapterConflict,
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    InvalidName,
    NoSpace,
    Problem,
    SourceNotAllowed,
    SourceNotFound,
    SourceUnavailable,
)
from adapters.model_spec import ModelSpec
from adapters.registry.registry import (
    AdapterRecord,
    AdapterRegistry,
    AdapterVersion,
    HistoryEntry,
    RegistryLocked,
    check_name,
)
from adapters.registry.store import AdapterStore
from adapters.sources import copy_from

__all__ = [
    "AdapterConflict",
    "AdapterError",
    "AdapterInvalid",
    "AdapterNotFound",
    "AdapterRecord",
    "AdapterRegistry",
    "AdapterStore",
    "AdapterTooLarge",
    "AdapterVersion",
    "HistoryEntry",
    "InvalidName",
    "ModelSpec",
    "NoSpace",
    "Problem",
    "RegistryLocked",
    "SourceNotAllowed",
    "SourceNotFound",
    "SourceUnavailable",
    "check_name",
    "copy_from",
]
