from typing import Any

import pytest

from server.api.errors import ApiError
from server.api.text.chat_template import Conversation
from server.api.text.detokenizer import Detokenizer
from server.api.text.tokenizer import Tokenizer, finite
from server.model.loading.default_model import prepare_default_model
from server.model.loading.loader import ModelRefused
from server.model.loading.tokenizer import describe, load_tokenizer
from tests.fixtures.api_server import byte_tokenizer, ids

TEXT = "Grüße, 世界! 👩‍👩‍👧 e\u0301 and <|plain|> words.\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def released(tokenizer: Tokenizer, text: str, stop: list[str] = [], **options: Any) -> list[str]:  # noqa: B006
    detokenizer = Detokenizer(tokenizer, [], stop, **options)
    parts = []
    for token_id in ids(tokenizer, text):
        parts.append(detokenizer.feed(token_id))
        if detokenizer.stopped:
            break
    return [*parts, detokenizer.flush()]


def test_releases_whole_characters_only(tokenizer: Tokenizer) -> None:
    parts = released(tokenizer, TEXT)
    assert "".join(parts) == TEXT
    assert not any("\ufffd" in part for part in parts)


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    first, *_ = ids(tokenizer, "😀")
    assert detokenizer.feed(first) == ""
    assert detokenizer.flush() == "\ufffd"


def test_stop_strings_across_tokens(tokenizer: Tokenizer) -> None:
    assert "".join(released(tokenizer, "ab END cd", ["END"])) == "ab "
    assert "".join(released(tokenizer, "ab EN", ["END"])) == "ab EN"  # a beginning alone is text after all
    assert "".join(released(tokenizer, "aaab", ["aab"])) == "a"
    assert "".join(released(tokenizer, "abcd", ["cd", "bc"])) == "a"
    assert "".join(released(tokenizer, "x😀y", ["😀"])) == "x"


def test_nothing_released_is_ever_taken_back(tokenizer: Tokenizer) -> None:
    for part in released(tokenizer, "ab EN x END", ["END"]):
        assert "E" not in part or part == "EN "


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    assert "".join(released(tokenizer, "xx.yy.zz", ["."], min_tokens=4)) == "xx.yy"


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    assert "".join(released(tokenizer, "a<|end|>b")) == "ab"


def test_a_prompt_that_ends_within_a_character(tokenizer: Tokenizer) -> None:
    whole = ids(tokenizer, "a 😀")
    detokenizer = Detokenizer(tokenizer, whole[:-1])
    assert detokenizer.feed(ids(tokenizer, "b")[0]) in ("b", "\ufffdb")


def test_token_bytes_are_exact(tokenizer: Tokenizer) -> None:
    assert b"".join(tokenizer.token_bytes(i) for i in ids(tokenizer, TEXT)) == TEXT.encode()
    assert tokenizer.token_bytes(ids(tokenizer, "<|end|>")[0]) == b"<|end|>"
    assert tokenizer.token_bytes(10_000) == b""


@pytest.mark.reliability("T24")
async def test_text_that_cannot_fit_is_refused_before_tokenizing(tokenizer: Tokenizer) -> None:
    with pytest.raises(ApiError) as refused:
        await tokenizer.encode("x" * 161, 10)
    assert refused.value.code == "context_length_exceeded"
    assert len(await tokenizer.encode("x" * 160, 10)) == 160


async def test_a_template_that_refuses_is_a_bad_request() -> None:
    picky = byte_tokenizer("{{ raise_exception('system first') }}")
    with pytest.raises(ApiError) as refused:
        await picky.render(Conversation([{"role": "user", "content": "x"}]), 100)
    assert refused.value.status_code == 400


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelRefused):
        describe(Slow())


def test_logprobs_are_finite() -> None:
    assert finite(float("-inf")) == -9999.0 and finite(-1.5) == -1.5


@pytest.mark.smollm2
async def test_the_default_model_s_tokenizer() -> None:
    tokenizer = Tokenizer.of(load_tokenizer(str(prepare_default_model())))
    prompt = await tokenizer.render(Conversation([{"role": "user", "content": "hi"}]), 8192)
    assert tokenizer.backend.decode(prompt, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    encoded = await tokenizer.encode(TEXT, 8192)
    detokenizer = Detokenizer(tokenizer, prompt)
    assert "".join(map(detokenizer.feed, encoded)) + detokenizer.flush() == TEXT
    assert b"".join(map(tokenizer.token_bytes, encoded)) == TEXT.encode()
