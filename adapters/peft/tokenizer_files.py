"""Reader and checks for the tokenizer and chat template that an adapter may include.

`tokenizer.json` alone determines how text becomes tokens; a class named by a config is never looked up. The configs
beside it give the special tokens and the chat template. Templates are compiled in a process of their own, not here.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from adapters.errors import AdapterInvalid, Problem, reraise_unless_foreign
from adapters.peft.config_reader import shown
from adapters.peft.safetensors_header import unique_keys
from adapters.peft.targets import some_of
from adapters.peft.tokenizer_json import admitted

TOKENIZER, CONFIG, SPECIAL, ADDED, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
MAX_TOKEN_ID = 1 << 20
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAMPLE = "A few words,\n\t2 numbers: 42; é, 世界 and 😀 ."


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Content of the tokenizer files. `tokenizer` is the text of tokenizer.json; `special_tokens` has the declared
    `SPECIAL_TOKENS`; `affixes` declares if bos and eos surround a plain text, and tokenizer.json decides where it
    does not; `added` maps tokens to the ids that the configs give them."""

    tokenizer: str | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    affixes: dict[str, bool] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the included parts, as in the report and in `Traits`."""
        given = {"tokenizer": self.tokenizer, "chat_template": self.chat_template}
        return tuple(name for name, value in given.items() if value is not None)

    def build(self) -> Tokenizer:
        """Build the tokenizer of tokenizer.json, which must exist. Raises `AdapterInvalid` if it is not admitted."""
        with _library_errors():
            return self.complete(self.read())

    def read(self) -> Tokenizer:
        """Build what tokenizer.json alone says."""
        assert self.tokenizer is not None
        return Tokenizer.from_str(admitted(self.tokenizer))

    def complete(self, tokenizer: Tokenizer) -> Tokenizer:
        """Apply the configs' declarations to `tokenizer`, and disable truncation and padding; returns `tokenizer`."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        unknown = [token for token in self.special_tokens.values() if token not in known]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unknown])
        if self.affixes:
            tokenizer.post_processor = self._affix(tokenizer)
        return tokenizer

    def _affix(self, tokenizer: Tokenizer) -> TemplateProcessing:
        """Build the post-processor that transformers uses instead of tokenizer.json's own when a config has
        `add_bos_token`."""
        before, after = (
            [self.special_tokens[name]] if self.affixes.get(f"add_{name}") and name in self.special_tokens else []
            for name in ("bos_token", "eos_token")
        )
        tokens = [(token, tokenizer.token_to_id(token)) for token in {*before, *after}]
        return TemplateProcessing(single=[*before, "$A", *after], pair=None, special_tokens=tokens)


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the tokenizer files in `folder`, each of which may be absent. Raises `AdapterInvalid` for a malformed
    file."""
    special = _read_object(folder, SPECIAL)
    config = _read_object(folder, CONFIG)
    template = _read_text(folder, TEMPLATE)
    return TokenizerFiles(
        _read_text(folder, TOKENIZER),
        _template(config) if template is None else template,
        {**_special_tokens(SPECIAL, special), **_special_tokens(CONFIG, config)},
        {key: config[key] for key in ("add_bos_token", "add_eos_token") if isinstance(config.get(key), bool)},
        {**_added_tokens(folder), **_added_by_id(config)},
    )


@dataclass(frozen=True, slots=True)
class BaseTokens:
    """The base model's tokenizer: `id_of` returns the id of a token or None, `eos` is its end token."""

    id_of: Callable[[str], int | None]
    eos: str | None


def check_tokenizer(folder: Path, vocab_size: int | None, base: BaseTokens | None = None) -> list[Problem]:
    """Return the problems of the tokenizer in `folder`; empty if it can be used. `vocab_size` is the model's number
    of token embeddings."""
    return examine_tokenizer(folder, vocab_size, base)[0]


def examine_tokenizer(
    folder: Path, vocab_size: int | None, base: BaseTokens | None = None
) -> tuple[list[Problem], list[str]]:
    """Return the problems of the tokenizer in `folder`, and sentences for the report about what is not used."""
    bound = MAX_TOKEN_ID if vocab_size is None else vocab_size
    try:
        files = read_tokenizer_files(folder)
        if files.tokenizer is None:
            problems, unused = _stray_tokens(folder, bound, base)
            return problems, [*unused, *_unknown_end(files, base)]
        with _library_errors():
            tokenizer = files.read()
        problems = list(_vocabulary_problems(files, tokenizer, bound))
        problems = problems or list(_usage_problems(files, tokenizer, bound))
        return problems, _unusable(TOKENIZER, _beyond(tokenizer, bound))
    except AdapterInvalid as error:
        return error.problems, []


def own_end(files: TokenizerFiles, base: BaseTokens | None) -> bool:
    """Return True if the files have no tokenizer and declare another end token than the base's, which the base's
    tokenizer knows."""
    end = files.special_tokens.get("eos_token")
    known = end is not None and base is not None and end != base.eos and base.id_of(end) is not None
    return files.tokenizer is None and known


def _unknown_end(files: TokenizerFiles, base: BaseTokens | None) -> list[str]:
    end = files.special_tokens.get("eos_token")
    if end is None or base is None or base.id_of(end) is not None:
        return []
    return [f"the eos_token {shown(end)} is no token of the base's tokenizer and ends no output"]


def _stray_tokens(folder: Path, bound: int, base: BaseTokens | None) -> tuple[list[Problem], list[str]]:
    """Check the added tokens of a slow tokenizer, whose other files are not read: they must be the base's own. Those
    beyond the model's vocabulary cannot have been trained and are not used."""
    if not (folder / ADDED).exists():
        return [], []
    added = _added_tokens(folder)
    expected = f"{TOKENIZER} beside it"
    if base is None:
        return [Problem(ADDED, "tokens without a tokenizer", expected, "malformed_file")], []
    other = {token: id for token, id in added.items() if base.id_of(token) != id}
    way_out = "the base's own tokens, or AutoTokenizer.from_pretrained(ADAPTER).save_pretrained(ADAPTER), which writes"
    problems = [
        Problem(
            ADDED, f"{shown(token)} as {id}, which is no token of the base", f"{way_out} {TOKENIZER}", "malformed_file"
        )
        for token, id in sorted(other.items())
        if id < bound
    ]
    return problems, _unusable(ADDED, {id: token for token, id in other.items() if id >= bound})


def _beyond(tokenizer: Tokenizer, bound: int) -> dict[int, str]:
    """Return the added tokens that the model has no embedding for, by id: such as a token for padding, which training
    masks and no prompt has."""
    added = tokenizer.get_added_tokens_decoder().items()
    return {id: token.content for id, token in added if bound <= id < MAX_TOKEN_ID}


def _unusable(where: str, tokens: Mapping[int, str]) -> list[str]:
    if not tokens:
        return []
    names = some_of(f"{shown(token)} ({id})" for id, token in tokens.items())
    return [f"{where}: the model has no embedding for {names}; a prompt with such a token is refused"]


def _vocabulary_problems(files: TokenizerFiles, tokenizer: Tokenizer, bound: int) -> Iterator[Problem]:
    vocabulary, beyond = tokenizer.get_vocab(), _beyond(tokenizer, bound)
    template, end = files.chat_template or "", files.special_tokens.get("eos_token")
    unused = {id for id, token in beyond.items() if token not in template and token != end}
    largest = max((id for id in vocabulary.values() if id not in unused), default=0)
    if largest >= bound:
        yield Problem(TOKENIZER, f"token id {largest}", f"ids below {bound}", "base_mismatch")
    for token in sorted({*files.special_tokens.values(), *files.added}):
        found, declared = tokenizer.token_to_id(token), files.added.get(token)
        if found is None or declared not in (None, found):
            expected = f"the token {shown(token)} that the files beside it have"
            yield Problem(TOKENIZER, "no such id" if found is None else f"id {found}", expected, "malformed_file")


def _usage_problems(files: TokenizerFiles, tokenizer: Tokenizer, bound: int) -> Iterator[Problem]:
    """Yield the problems that show only in use: a broken component, or ids of the tokens that surround a text."""
    with _library_errors():
        ids = files.complete(tokenizer).encode(_SAMPLE).ids
        tokenizer.decode(ids)
    if max(ids, default=0) >= bound:
        yield Problem(TOKENIZER, f"token id {max(ids)} around a text", f"ids below {bound}", "base_mismatch")


@contextmanager
def _library_errors() -> Iterator[None]:
    """Turn errors of the tokenizers library into `AdapterInvalid`. The library raises bare `Exception`s and panics."""
    try:
        yield
    except AdapterInvalid:
        raise
    except BaseException as error:
        reraise_unless_foreign(error)
        raise _invalid(TOKENIZER, shown(str(error), 200), "a tokenizer that the tokenizers library can use") from None


def _read_text(folder: Path, name: str) -> str | None:
    try:
        return (folder / name).read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise _invalid(name, "bytes that are not UTF-8", "text") from None


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    text = _read_text(folder, name)
    if text is None:
        return {}
    try:
        found = json.loads(text, object_pairs_hook=unique_keys)
        json.dumps(found, ensure_ascii=False).encode()  # raises for half of a surrogate pair, which is no character
    except (ValueError, RecursionError):
        raise _invalid(name, "no JSON", "a JSON object") from None
    if not isinstance(found, dict):
        raise _invalid(name, shown(found), "a JSON object")
    return found


def _template(config: Mapping[str, Any]) -> str | None:
    """Return the chat template, or of several the one named "default"."""
    given = config.get("chat_template")
    if isinstance(given, list):
        entries = [entry for entry in given if isinstance(entry, dict) and entry.get("name") == "default"]
        given = entries[0].get("template") if len(entries) == 1 else given
    if given is not None and not isinstance(given, str):
        raise _invalid(f"{CONFIG}: chat_template", shown(given), "a template, or several of which one is the default")
    return given


def _special_tokens(where: str, config: Mapping[str, Any]) -> dict[str, str]:
    given = {name: config[name] for name in SPECIAL_TOKENS if config.get(name) is not None}
    return {name: _content(f"{where}: {name}", value) for name, value in given.items()}


def _content(where: str, token: Any) -> str:
    """Return the text of a token, which is written as a string or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise _invalid(where, shown(token), "a token")
    return content


def _added_tokens(folder: Path) -> dict[str, int]:
    given = _read_object(folder, ADDED)
    if any(type(value) is not int for value in given.values()):
        raise _invalid(ADDED, "a value that is no number", "tokens with their ids")
    return given


def _added_by_id(config: Mapping[str, Any]) -> dict[str, int]:
    where = f"{CONFIG}: added_tokens_decoder"
    given = config.get("added_tokens_decoder", {})
    if not isinstance(given, dict) or not all(key.isdecimal() and len(key) < 10 for key in given):
        raise _invalid(where, shown(given), "tokens by their ids")
    return {_content(where, token): int(key) for key, token in given.items()}


def _invalid(where: str, found: str, expected: str) -> AdapterInvalid:
    return AdapterInvalid([Problem(where, found, expected, "malformed_file")])
