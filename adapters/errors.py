"""All adapter errors in one hierarchy; each class carries the HTTP status and error code of the API contract.

AdapterError
├── AdapterNotFound     404  model_not_found
├── InvalidName         400  invalid_name
├── AdapterInvalid      422  adapter_invalid, with every problem
├── AdapterConflict     409  conflict
├── SourceNotAllowed    403  source_not_allowed
├── SourceNotFound      404  source_not_found
├── SourceUnavailable   503  source_unavailable
├── AdapterTooLarge     413  too_large
└── NoSpace             507  insufficient_storage
"""

from dataclasses import asdict, dataclass
from typing import Literal

ProblemCode = Literal[
    "shape_mismatch",
    "rank_too_large",
    "nonfinite",
    "unsupported_feature",
    "unknown_key",
    "base_mismatch",
    "no_target",
    "malformed_file",
]


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why an adapter cannot be served: its location, the value found there and the values that are
    accepted."""

    where: str
    found: str
    expected: str
    code: ProblemCode

    def as_dict(self) -> dict[str, str]:
        """Return the problem as a JSON object."""
        return asdict(self)


class AdapterError(Exception):
    """Base of all errors below. `str(error)` is a sentence for the client."""

    status = 500
    code = "adapter_error"


class AdapterNotFound(AdapterError):
    """No adapter has the requested name or version."""

    status = 404
    code = "model_not_found"


class InvalidName(AdapterError):
    """The name is not valid for an adapter: `adapters/names.py` has the rule."""

    status = 400
    code = "invalid_name"


class AdapterInvalid(AdapterError):
    """The upload is not an adapter that this server can apply exactly; `problems` lists every reason."""

    status = 422
    code = "adapter_invalid"

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{first.where}: found {first.found}, expected {first.expected}{more}")


class AdapterConflict(AdapterError):
    """The name is taken, or there is no version to roll back to."""

    status = 409
    code = "conflict"


class SourceNotAllowed(AdapterError):
    """The source is not below any `--allow-source` entry."""

    status = 403
    code = "source_not_allowed"


class SourceNotFound(AdapterError):
    """The source holds no adapter."""

    status = 404
    code = "source_not_found"


class SourceUnavailable(AdapterError):
    """The source's server does not respond, or the content it sends does not match its own description."""

    status = 503
    code = "source_unavailable"


class AdapterTooLarge(AdapterError):
    """The files are larger than `--max-upload-bytes`."""

    status = 413
    code = "too_large"


class NoSpace(AdapterError):
    """The disk is nearly full, or `--adapter-store-bytes` is reached."""

    status = 507
    code = "insufficient_storage"


RefusalCode = Literal["busy", "invalid", "no_room", "not_mergeable", "failed"]


class MoveRefused(Exception):
    """A requested move between tiers or a merge cannot be done; `code` gives the kind of reason."""

    def __init__(self, code: RefusalCode, message: str):
        super().__init__(message)
        self.code: RefusalCode = code


def reraise_unless_foreign(error: BaseException) -> None:
    """Raise `error` again if it ends a task or the process. Else it is an `Exception`, or a panic of a library's Rust
    code, which derives from `BaseException` alone, so that an `except Exception` around foreign content misses it."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
