"""Components that a tokenizer of a stranger may have: those of the usual families, whose cost is linear in the text.

A normalizer, pre-tokenizer or decoder is a small program that runs in the API's process, and a regular expression can
take exponential time. Only expressions and replacements that published models use are admitted. The others have a
known growth: the number of characters that they make of one at most. The product over a tokenizer is limited.
"""

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from adapters.errors import AdapterInvalid, Problem
from adapters.peft.config_reader import shown
from adapters.peft.known_expressions import REPLACEMENTS, SPLITS

MAX_GROWTH = 100  # NFKC makes 18 characters of one, and ByteLevel 4 of these
MAX_PARTS = 16  # of a normalizer, pre-tokenizer or decoder
_MAX_AFFIX = 32  # characters of a prefix or suffix of the pieces of words
_MAX_LITERAL = 256  # characters of a text at which others are split
_MAX_TEMPLATE = 64  # parts and tokens around a text
_MAX_CHARSMAP_BYTES = 1 << 20
_MAX_DEPTH = 4  # of sequences in sequences

Part = Mapping[str, Any]
Growth = Callable[[Part], float]  # infinite for a part that is not admitted


def check_parts(tokenizer: Mapping[str, Any]) -> None:
    """Raise `AdapterInvalid` that names each component that is not admitted."""
    found = [_examine(tokenizer, *kind) for kind in _KINDS]
    problems = [problem for _, refused in found for problem in refused]
    growth = math.prod(growth for growth, _ in found)
    if not problems and growth > MAX_GROWTH:
        expected = f"at most {MAX_GROWTH}"
        found_growth = f"components that make {growth:g} characters of one"
        problems = [Problem("tokenizer.json", found_growth, expected, "unsupported_feature")]
    if problems:
        raise AdapterInvalid(problems)


def _examine(
    tokenizer: Mapping[str, Any], kind: str, members: str, admitted: Mapping[str, Growth]
) -> tuple[float, list[Problem]]:
    """Return the growth of one kind of component, and the problems with it."""
    parts = [*islice(_flat(tokenizer.get(kind), members), MAX_PARTS + 1)]
    growths = [_growth(part, admitted) for part in parts]
    where = f"tokenizer.json: {kind}"
    refused = [json.dumps(part) for part, growth in zip(parts, growths, strict=True) if not math.isfinite(growth)]
    expected = f"components as published models have them, of {', '.join(admitted)}"
    problems = [Problem(where, shown(part, 200), expected, "unsupported_feature") for part in refused[:1]]
    if len(parts) > MAX_PARTS:
        problems.append(Problem(where, "too many parts", f"at most {MAX_PARTS}", "unsupported_feature"))
    return math.prod(growths), problems


def _flat(part: Any, members: str, depth: int = 0) -> Iterator[Any]:
    """Yield the parts of nested sequences, in the order in which they run."""
    if part is None:
        return
    if (
        isinstance(part, dict)
        and part.get("type") == "Sequence"
        and depth < _MAX_DEPTH
        and isinstance(part.get(members), list)
    ):
        yield from chain.from_iterable(_flat(one, members, depth + 1) for one in part[members])
    else:
        yield part


def _growth(part: Any, admitted: Mapping[str, Growth]) -> float:
    try:
        return admitted[part["type"]](part)
    except (AttributeError, KeyError, TypeError, ValueError):  # an unknown type, or fields of a wrong one
        return math.inf


def _if(admitted: object, growth: float = 1) -> float:
    return growth if admitted else math.inf


def _always(growth: float) -> Growth:
    return lambda _: growth


def _is_short(text: Any, least: int = 0) -> bool:
    return text is None or (isinstance(text, str) and least <= len(text) <= _MAX_AFFIX)


def _pattern(part: Part) -> tuple[str, str]:
    """Return the kind of the pattern, String or Regex, and its text."""
    ((kind, text),) = part["pattern"].items()
    return kind, text


def _replace(part: Part) -> float:
    return _if((*_pattern(part), part["content"]) in REPLACEMENTS)


def _split(part: Part) -> float:
    kind, text = _pattern(part)
    return _if(text in SPLITS if kind == "Regex" else 0 < len(text) <= _MAX_LITERAL)


def _charsmap(part: Part) -> float:
    """Return the length of the longest replacement of SentencePiece's compiled map: after the length of its index and
    the index follow the replacements, each ended by a zero."""
    data = base64.b64decode(part["precompiled_charsmap"] or "")
    if not data:
        return 1
    if len(data) > _MAX_CHARSMAP_BYTES:
        return math.inf
    index_bytes = int.from_bytes(data[:4], "little")
    if index_bytes % 4 or 4 + index_bytes > len(
        data
    ):  # the library would allocate twice as much, and abort if it can't
        return math.inf
    texts = data[4 + index_bytes :].split(b"\0")
    return max(1, *(len(text.decode()) for text in texts))


def _strip_decoder(part: Part) -> float:
    return _if(part["start"] in (0, 1) and part["stop"] == 0)


def _template(part: Part) -> float:
    """A template must have the text once, and few tokens around it."""
    single, tokens = part["single"], part["special_tokens"].values()
    texts = sum("Sequence" in piece for piece in single)
    num_ids = max((len(token["ids"]) for token in tokens), default=0)
    small = max(len(single), len(part["pair"]), num_ids, len(tokens)) <= _MAX_TEMPLATE
    return _if(texts == 1 and small)


# The factors of Unicode's normal forms are those of its technical report 15; U+FDFA has 18 letters.
_NORMALIZERS: dict[str, Growth] = {
    "NFC": _always(3),
    "NFD": _always(4),
    "NFKC": _always(18),
    "NFKD": _always(18),
    "Lowercase": _always(2),
    "StripAccents": _always(1),
    "Nmt": _always(1),
    "Strip": _always(1),
    "BertNormalizer": _always(8),  # a space on both sides of a Chinese character, or NFD and Lowercase
    "Replace": _replace,
    "Prepend": lambda part: _if(len(part["prepend"]) == 1, 2),
    "Precompiled": _charsmap,
    "ByteLevel": _always(4),
}
_PRE_TOKENIZERS: dict[str, Growth] = {
    "ByteLevel": _always(4),
    "Metaspace": _always(2),
    "Whitespace": _always(1),
    "WhitespaceSplit": _always(1),
    "BertPreTokenizer": _always(1),
    "Punctuation": _always(1),
    "Digits": _always(1),
    "UnicodeScripts": _always(1),
    "CharDelimiterSplit": _always(1),
    "Split": _split,
}
_DECODERS: dict[str, Growth] = {
    "ByteLevel": _always(1),
    "ByteFallback": _always(1),
    "Fuse": _always(1),
    "Metaspace": _always(1),
    "Replace": _replace,
    "Strip": _strip_decoder,
    "WordPiece": lambda part: _if(_is_short(part["prefix"])),
    "BPEDecoder": lambda part: _if(_is_short(part["suffix"], 1)),  # an empty one is found around each character
}
_PROCESSORS: dict[str, Growth] = {
    "ByteLevel": _always(1),
    "BertProcessing": _always(1),
    "RobertaProcessing": _always(1),
    "TemplateProcessing": _template,
}
_KINDS: tuple[tuple[str, str, dict[str, Growth]], ...] = (
    ("normalizer", "normalizers", _NORMALIZERS),
    ("pre_tokenizer", "pretokenizers", _PRE_TOKENIZERS),
    ("post_processor", "processors", _PROCESSORS),
    ("decoder", "decoders", _DECODERS),
)
