"""The worker process that compiles and renders chat templates of adapters. Reads one request per line of standard input
and writes one response per line of standard output. Imports nothing from the server; ends with its input, or when a
request takes longer than the seconds in its argument.

The Jinja environment is the same as in transformers.
"""

import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_MEMORY_BYTES = 512 << 20
MAX_OUTPUT_CHARS = 4 << 20
_MAX_REASON_CHARS = 200
_LIMITS = {
    resource.RLIMIT_AS: MAX_MEMORY_BYTES,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NPROC: 0,
}


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training; here it only renders its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's namespace without attributes that have a meaning in Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"namespaces have no attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    """Compile a template in its own environment, so that templates cannot share state."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _render(template: Template, context: dict[str, Any]) -> str:
    parts, length = [], 0
    for part in template.generate(**context):
        length += len(part)
        if length > MAX_OUTPUT_CHARS:
            raise TemplateError(f"more than {MAX_OUTPUT_CHARS} characters")
        parts.append(part)
    text = "".join(parts)
    text.encode()  # raises for a lone surrogate
    return text


def respond(request: dict[str, Any]) -> dict[str, str]:
    """Return `text`, or the reason for a failure in `error`. Without a `context` the template is only compiled."""
    try:
        template = _compile(request["template"])
        return {"text": _render(template, request["context"]) if "context" in request else ""}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # a template is a program and may raise anything
        return {"error": _printable(str(error) or type(error).__name__)}


def _printable(reason: str) -> str:
    """Escape control characters and remove addresses, which Python shows in the text of objects."""
    return re.sub(r"0x[0-9a-f]+", "...", ascii(reason[:_MAX_REASON_CHARS])[1:-1])


def main(give_up_seconds: float, write: Callable[[bytes], object] = sys.stdout.buffer.write) -> None:
    for limit, value in _LIMITS.items():
        resource.setrlimit(limit, (value, value))
    write(b"\n")  # tells the server that the worker is ready
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, give_up_seconds)  # the signal ends the process, even within one operation
        reply = json.dumps(respond(json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        write(reply.encode() + b"\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
