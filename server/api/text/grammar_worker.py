"""The worker process that compiles grammars. Reads one request per line of standard input and writes one response per
line of standard output. Imports nothing from the server; ends with its input, or when a request takes longer than the
seconds in its argument.

A grammar is compiled over single bytes instead of a model's tokens: what it costs depends on the grammar.
"""

import json
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_MEMORY_BYTES = 1 << 30
_MAX_REASON_CHARS = 300
_LIMITS = {
    resource.RLIMIT_AS: MAX_MEMORY_BYTES,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NPROC: 0,
}
# JSON is written as Python writes it, without optional white space, which weak models repeat for ever. A schema is
# followed as a whole or refused: no keyword is skipped, and `oneOf` does not become `anyOf`.
_JSON_OPTIONS: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}


def respond(request: dict[str, Any], tokenizer: LLTokenizer) -> dict[str, str]:
    """Return llguidance's description of the grammar in `text`, or the reason for a failure in `error`."""
    try:
        grammar = _compile(request["kind"], request["source"])
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**request["limits"]))
        mask = matcher.compute_bitmask()  # the first step is often the dearest
        if matcher.is_error():
            return {"error": _reason(matcher.get_error())}
        if not _allows_text(mask, tokenizer):
            return {"error": "it allows no text"}
        return {"text": grammar}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # the converter of grammars raises many kinds
        return {"error": _reason(str(error) or type(error).__name__)}


def _compile(kind: str, source: str) -> str:
    if kind == "json":
        return LLMatcher.grammar_from_json_schema(source, overrides=_JSON_OPTIONS)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    return grammar_from("choice" if kind == "choice" else "grammar", source)


def _allows_text(mask: bytes, tokenizer: LLTokenizer) -> bool:
    allowed = bytearray(mask)
    for token in tokenizer.eos_tokens:
        allowed[token >> 3] &= 0xFF ^ (1 << (token & 7))
    return any(allowed)


def _reason(reason: str) -> str:
    lines = [line.strip() for line in reason.partition("<state>")[0].splitlines() if line.strip()]
    return ascii(" ".join(lines)[:_MAX_REASON_CHARS])[1:-1] if lines else "it cannot be compiled"


def main(give_up_seconds: float) -> None:
    tokenizer = LLTokenizer("byte")
    for limit, value in _LIMITS.items():
        resource.setrlimit(limit, (value, value))
    sys.stdout.write("\n")  # tells the server that the worker is ready
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, give_up_seconds)  # the signal ends the process, even within one operation
        reply = json.dumps(respond(json.loads(line), tokenizer))
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
