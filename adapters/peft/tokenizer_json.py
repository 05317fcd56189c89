"""Reading of a stranger's tokenizer.json: only the parts that are built, bounded in number and size.

The library gets these parts written anew, not the file, so that it builds exactly what was checked here.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from adapters.errors import AdapterInvalid, Problem
from adapters.peft.config_reader import shown
from adapters.peft.tokenizer_parts import check_parts

MAX_TOKENS = 1 << 20
MAX_MERGES = 1 << 20  # Gemma has 514,906
MAX_ADDED_TOKENS = 1 << 17  # models of speech and images add tens of thousands
MAX_TOKEN_CHARS = 1024
MAX_PIECE_CHARS = 64  # of a Unigram piece: each position of a text is compared with pieces of each length
MAX_WORD_CHARS = 100  # of WordPiece, whose cost is the square of a word's length

_MAX_PART_BYTES = 2 << 20  # a SentencePiece map of characters has some 300 kB
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_WHERE = "tokenizer.json"


_NONE, _NULL = msgspec.Raw(b""), msgspec.Raw(b"null")


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Model(msgspec.Struct, omit_defaults=True):
    vocab: dict[str, int] | list[tuple[str, float]]
    type: Literal["BPE", "Unigram", "WordPiece", "WordLevel"] | None = None
    merges: msgspec.Raw = _NONE
    unk_token: str | None = None
    unk_id: int | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    max_input_chars_per_word: int | None = None
    dropout: float | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _File(msgspec.Struct):
    """The version, truncation and padding are not read."""

    model: msgspec.Raw
    added_tokens: list[_AddedToken] = []
    normalizer: msgspec.Raw = _NULL
    pre_tokenizer: msgspec.Raw = _NULL
    post_processor: msgspec.Raw = _NULL
    decoder: msgspec.Raw = _NULL


def admitted(text: str) -> str:
    """Return the parts of a tokenizer.json that are built, as JSON. Raises `AdapterInvalid` for a file that is
    malformed, too large, or has a component that is not admitted."""
    try:
        file = msgspec.json.decode(text, type=_File)
        _check_size(file)
        parts = {name: msgspec.json.decode(getattr(file, name)) for name in _PARTS}
        check_parts(parts)
        model = msgspec.json.decode(file.model, type=_Model)
        model.type = model.type or _kind_of(model)
        _refuse([*_added_problems(file.added_tokens), *_model_problems(model)])
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError) as error:
        expected = "a tokenizer that the tokenizers library can use"
        raise AdapterInvalid([Problem(_WHERE, shown(str(error), 200), expected, "malformed_file")]) from None
    written = {"version": "1.0", "added_tokens": file.added_tokens, **parts, "model": model}
    return msgspec.json.encode(written).decode()


def _check_size(file: _File) -> None:
    """Refuse what is too large before Python objects are made of it: no entry of a model is without a comma."""
    commas, most = bytes(file.model).count(b","), 2 * (MAX_TOKENS + MAX_MERGES)
    found = [("model", f"{commas} entries", f"at most {most}")] if commas > most else []
    for name in _PARTS:
        length = len(bytes(getattr(file, name)))
        if length > _MAX_PART_BYTES:
            found.append((name, f"{length} bytes", f"at most {_MAX_PART_BYTES}"))
    _refuse(found)


def _refuse(found: Iterable[tuple[str, str, str]]) -> None:
    problems = [Problem(f"{_WHERE}: {where}", what, most, "unsupported_feature") for where, what, most in found]
    if problems:
        raise AdapterInvalid(problems)


def _kind_of(model: _Model) -> Literal["BPE", "Unigram", "WordPiece", "WordLevel"]:
    """Return the type of a model of the library's early versions, which did not write it."""
    if bytes(model.merges):
        return "BPE"
    if isinstance(model.vocab, list):
        return "Unigram"
    return "WordPiece" if model.continuing_subword_prefix is not None else "WordLevel"


def _added_problems(tokens: list[_AddedToken]) -> Iterator[tuple[str, str, str]]:
    if len(tokens) > MAX_ADDED_TOKENS:
        yield "added_tokens", f"{len(tokens)} tokens", f"at most {MAX_ADDED_TOKENS}"
    longest = max((len(token.content) for token in tokens), default=0)
    if longest > MAX_TOKEN_CHARS:
        yield "added_tokens", f"a token of {longest} characters", f"at most {MAX_TOKEN_CHARS}"


def _model_problems(model: _Model) -> Iterator[tuple[str, str, str]]:
    tokens = list(model.vocab) if isinstance(model.vocab, dict) else [token for token, _ in model.vocab]
    where, most = f"model ({model.type})", MAX_PIECE_CHARS if model.type == "Unigram" else MAX_TOKEN_CHARS
    longest, num_merges = max(map(len, tokens), default=0), _num_merges(model)
    if longest > most:
        yield where, f"a token of {longest} characters", f"at most {most}"
    if len(tokens) > MAX_TOKENS:
        yield where, f"{len(tokens)} tokens", f"at most {MAX_TOKENS}"
    if num_merges > MAX_MERGES:
        yield where, f"{num_merges} merges", f"at most {MAX_MERGES}"
    if model.dropout:
        yield where, f"dropout {model.dropout:g}", "none, so that a text has always the same tokens"
    if model.type == "WordPiece" and not 0 <= (model.max_input_chars_per_word or 0) <= MAX_WORD_CHARS:
        found = f"max_input_chars_per_word {model.max_input_chars_per_word}"
        yield where, found, f"at most {MAX_WORD_CHARS}"
    affixes = model.continuing_subword_prefix, model.end_of_word_suffix
    if any(affix is not None and len(affix) > MAX_PIECE_CHARS for affix in affixes):
        yield where, "a long prefix or suffix of pieces", f"at most {MAX_PIECE_CHARS} characters"


def _num_merges(model: _Model) -> int:
    return len(msgspec.json.decode(model.merges, type=list[msgspec.Raw])) if bytes(model.merges) else 0
