"""Adapters with a tokenizer or chat template of their own, over the whole API."""

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from adapters.peft.files import FILES, TOKENIZER_FILES
from adapters.peft.tokenizer_files import check_tokenizer
from adapters.registry.store import AdapterStore
from adapters.traits import Traits
from server.api.text import template_sandbox, worker_pool
from server.api.text.adapter_tokenizers import AdapterTokenizers
from server.api.text.chat_template import Conversation
from server.api.text.template_sandbox import TemplateSandbox
from server.api.text.tokenizer import Tokenizer
from server.model.loading.default_model import prepare_default_model
from server.model.loading.tokenizer import load_tokenizer
from tests.fixtures.api_server import EOS, Api, assert_error, events, ids, serving, tokenizer_files
from tests.fixtures.timing import HANG_SECONDS, eventually, leap

TOOL = 258  # the first id past the base's vocabulary
OWN_TEMPLATE = "{{ bos_token }}{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}<tool>"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def widen(api: Api, vocab_size: int = 300) -> None:
    """Give the fake base more embeddings than its tokenizer has tokens, as real ones have."""
    api.context.engine._supervisor.info = msgspec.structs.replace(api.engine.info, vocab_size=vocab_size)


async def publish(api: Api, name: str, *added: str, seed: int = 0, replace: bool = False, **options: Any) -> str:
    """Upload an adapter with a tokenizer; returns its version."""
    files = tokenizer_files(*added, **options)
    answer = await api.upload(name, seed, files, replace=str(replace).lower())
    assert answer.status_code == 201, answer.text
    version: str = answer.json()["version"]
    return version.removeprefix("sha256:")


async def publish_template(api: Api, name: str, template: str, **config: str) -> httpx.Response:
    files = {"chat_template.jinja": template.encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return await api.upload(name, beside=files)


def last_prompt(api: Api) -> list[int]:
    return api.engine.submitted[-1].token_ids


def text(api: Api, token_ids: list[int]) -> str:
    return str(api.context.tokenizer.backend.decode(token_ids, skip_special_tokens=False))


async def test_added_tokens_are_one_token_in_and_out(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        widen(api)
        await publish(api, "tools", "<tool>")
        x = ids(api.context.tokenizer, "x")
        api.engine.script = lambda _: [*x, TOOL, *x, *api.engine.info.eos_token_ids]
        answer = (await api.complete("x<tool>x", model="tools", logprobs=0)).json()["choices"][0]
        assert last_prompt(api) == [*x, TOOL, *x]
        assert answer["text"] == "x<tool>x" and answer["logprobs"]["tokens"] == ["x", "<tool>", "x"]
        chat = (await api.chat("<tool>", model="tools", logprobs=True)).json()["choices"][0]
        assert TOOL in last_prompt(api) and chat["message"]["content"] == "x<tool>x"
        assert bytes(chat["logprobs"]["content"][1]["bytes"]) == b"<tool>"
        chunks = events(await api.chat("x", model="tools", stream=True, stop=["<tool>"]))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "x"


async def test_a_token_without_an_embedding_is_refused_when_a_prompt_has_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.context.engine._supervisor.info = msgspec.structs.replace(api.engine.info, vocab_size=TOOL)
        spec = api.engine.info.spec
        rows = {
            name: {key: (TOOL, *shape[1:]) if shape[0] == 300 else shape for key, shape in own.items()}
            for name, own in spec.parameters.items()
        }
        api.context.engine._supervisor.info = msgspec.structs.replace(
            api.context.engine.info, spec=dataclasses.replace(spec, parameters=rows)
        )
        await publish(api, "padded", "[PAD]")
        assert (await api.complete("x", model="padded")).status_code == 200
        assert_error(await api.complete("x[PAD]", model="padded"), 400)


async def test_an_end_token_without_a_tokenizer_ends_outputs(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        config = json.dumps({"eos_token": "q", "tokenizer_class": "LlamaTokenizer"}).encode()
        slow = {"added_tokens.json": json.dumps({EOS: ids(api.context.tokenizer, EOS)[0]}).encode()}
        answer = await api.upload("ends", beside={"tokenizer_config.json": config, **slow})
        assert answer.status_code == 201 and "eos_token" in answer.json()["report"]["features"]
        await api.complete("x", model="ends")
        (end,) = ids(api.context.tokenizer, "q")
        assert end in api.engine.submitted[-1].sampling.stop_token_ids
        await api.complete("x")
        assert end not in api.engine.submitted[-1].sampling.stop_token_ids


async def test_the_base_and_other_adapters_keep_the_base_s(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        widen(api)
        await publish(api, "tools", "<tool>")
        assert (await api.upload("plain", seed=1)).status_code == 201
        expected = ids(api.context.tokenizer, "<tool>")
        assert len(expected) == 6
        for options in ({}, {"model": "plain"}):
            await api.complete("<tool>", model="tools")
            await api.complete("<tool>", **options)
            assert last_prompt(api) == expected


async def test_a_chat_template_of_its_own(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await publish_template(api, "own", OWN_TEMPLATE, bos_token="<s>")
        assert answer.json()["report"]["features"] == ["chat_template"]
        await api.chat("hi", model="own")
        assert text(api, last_prompt(api)) == "<s>(user) hi\n<tool>"
        await api.chat("hi")
        assert text(api, last_prompt(api)).startswith("<|start|>user\nhi")
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
        await api.chat(model="own", messages=messages, continue_final_message=True)
        assert text(api, last_prompt(api)) == "<s>(user) hi\n(assistant) Well, "


async def test_a_template_that_trims_the_message_to_continue(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await publish_template(api, "own", "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
        await api.chat(model="own", messages=messages, continue_final_message=True)
        assert text(api, last_prompt(api)) == "[hi][Well,"
        await publish_template(api, "silent", "silence")
        assert_error(await api.chat(model="silent", messages=messages, continue_final_message=True), 400)


async def test_a_tokenizer_without_template_speaks_the_base_s(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        widen(api)
        await publish(api, "tools", "<tool>", template=None)
        await api.chat("<tool>", model="tools")
        after = ids(api.context.tokenizer, "<|end|>\n<|start|>assistant\n")
        assert last_prompt(api)[-len(after) - 1 :] == [TOOL, *after]


async def test_its_eos_token_ends_the_answer(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        widen(api)
        await publish(api, "own", "<|done|>", eos_token="<|done|>")
        x = ids(api.context.tokenizer, "x")
        api.engine.script = lambda submit: [*x, TOOL] if TOOL in submit.sampling.stop_token_ids else x * 1000
        choice = (await api.complete(model="own", stop_token_ids=[5])).json()["choices"][0]
        assert choice["text"] == "x" and choice["finish_reason"] == "stop"
        assert api.engine.submitted[-1].sampling.stop_token_ids == (5, TOOL)
        await api.complete(model="own", ignore_eos=True)
        assert api.engine.submitted[-1].sampling.stop_token_ids == ()
        await api.complete()
        assert api.engine.submitted[-1].sampling.stop_token_ids == ()
        await publish_template(api, "template", "x", eos_token=EOS)
        await api.complete(model="template")
        assert list(api.engine.submitted[-1].sampling.stop_token_ids) == api.engine.info.eos_token_ids


async def test_the_version_decides(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        widen(api)
        first = await publish(api, "own", "<tool>")
        await api.complete("<tool>", model="own")
        second = await publish(api, "own", "<x>", "<tool>", replace=True)
        assert first != second  # though their weights are the same
        for model, expected in (("own", TOOL + 1), (f"own@{first[:12]}", TOOL), (f"own@{second[:12]}", TOOL + 1)):
            await api.complete("<tool>", model=model)
            assert last_prompt(api) == [expected] and api.engine.submitted[-1].adapters[0].digest in (first, second)
        assert (await api.http.post("/v1/adapters/own/rollback")).status_code == 200
        await api.complete("<tool>", model="own")
        assert last_prompt(api) == [TOOL] and api.engine.submitted[-1].adapters[0].digest == first


async def test_tokens_without_an_embedding_never_reach_the_engine(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await publish(api, "tools", "<tool>")
        assert_error(await api.complete("<tool>", model="tools"), 400, "invalid_value")
        assert_error(await api.chat("<tool>", model="tools"), 400, "invalid_value")
        assert_error(await api.complete([TOOL], model="tools"), 400, "invalid_value")
        assert api.engine.submitted == []
        await publish_template(api, "silent", "{{ missing }}")
        assert_error(await api.chat(model="silent"), 400, "invalid_value")
        await publish(api, "ends", "<tool>", eos_token="<tool>")
        await api.complete(model="ends")
        assert api.engine.submitted[-1].sampling.stop_token_ids == ()


async def test_deleted_while_its_tokenizer_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as api:
        version = await publish(api, "own", "<tool>")
        load = api.context.tokenizers._load

        def late(*of: Any) -> Any:
            asyncio.run_coroutine_threadsafe(remove(), loop).result()
            return load(*of)

        async def remove() -> None:
            assert (await api.http.delete("/v1/adapters/own")).status_code == 200

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(api.context.tokenizers, "_load", late)
        assert_error(await api.complete(model="own"), 404, "model_not_found")
        assert version not in api.context.tokenizers._loaded


async def test_a_few_tokenizers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.text.adapter_tokenizers._KEPT", 2)
    async with serving(tmp_path) as api:
        versions = [await publish(api, f"a{seed}", seed=seed) for seed in range(3)]
        for name in ("a0", "a1", "a0", "a2"):
            await api.complete(model=name)
        assert list(api.context.tokenizers._loaded) == [(versions[0], None), (versions[2], None)]


async def test_a_template_fails_alone(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        refusing = "{{ raise_exception('roles must alternate') if messages | length > 1 else 'go' }}"
        await publish_template(api, "own", refusing)
        messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        error = assert_error(await api.chat(model="own", messages=messages), 400)
        assert error["message"] == "The adapter's chat template failed: roles must alternate."
        assert (await api.chat(model="own")).status_code == 200


async def test_a_hostile_template_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    exchange = worker_pool.exchange

    async def noted(worker: Any, question: dict[str, Any], seconds: float) -> dict[str, str]:
        begun.append(question["template"])
        return await exchange(worker, question, seconds)

    async with serving(tmp_path) as api:
        await publish_template(api, "hostile", ENDLESS)
        await publish_template(api, "own", OWN_TEMPLATE)
        monkeypatch.setattr(worker_pool, "exchange", noted)
        hostile = [asyncio.create_task(api.chat(model="hostile")) for _ in range(3)]
        await eventually(lambda: begun)
        for fields in ({"model": "own"}, {}):
            assert (await api.chat(**fields)).status_code == 200
        assert not any(task.done() for task in hostile) and begun == [ENDLESS, OWN_TEMPLATE]
        leap(HANG_SECONDS)
        monkeypatch.setattr(template_sandbox, "RENDER_SECONDS", 0.1)
        for task in hostile:
            assert "longer than" in assert_error(await task, 400)["message"]


async def test_its_files_can_be_downloaded_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await publish_template(api, "own", "x")
        assert (await api.http.get("/v1/adapters/own/files/chat_template.jinja")).content == b"x"
        assert_error(await api.http.get("/v1/adapters/own/files/tokenizer.json"), 404, "not_found")


async def test_unusable_files_are_problems(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        config = b'{"chat_template": "{% for %}"}'
        files = {"tokenizer.json": b"{}", "tokenizer_config.json": config}
        error = assert_error(await api.upload("own", beside=files), 422, "adapter_invalid")
        places = [problem["where"] for problem in error["problems"]]
        assert places == ["tokenizer.json", "tokenizer_config.json: chat_template"]
        error = assert_error(await publish_template(api, "own", "{{ 10 ** 10 ** 10 ** 10 }}{{"), 422, "adapter_invalid")
        assert [problem["where"] for problem in error["problems"]] == ["chat_template.jinja"]


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenization.py", "vocab.json", "../tokenizer.json"])
async def test_no_other_file_is_taken(tmp_path: Path, name: str) -> None:
    async with serving(tmp_path) as api:
        assert_error(await api.upload("own", beside={name: b"x"}), 415, "unsupported_media_type")


async def test_files_of_a_tokenizer_have_sizes(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        assert_error(await publish_template(api, "own", "x" * ((1 << 20) + 1)), 413, "too_large")
        assert (await publish_template(api, "own", "x" * (1 << 20))).status_code == 201


@pytest.mark.slow
@pytest.mark.smollm2
async def test_the_default_model_s_own_files_change_nothing(tmp_path: Path) -> None:
    """As an adapter's files, they give the same tokens as transformers with the base model."""
    base = Tokenizer.of(load_tokenizer(str(prepare_default_model())))
    store = AdapterStore(tmp_path / "store")
    with store.stage() as folder:
        for name in FILES:
            (folder / name).write_bytes(b"x")
        for path in prepare_default_model().iterdir():
            if path.name in TOKENIZER_FILES:
                (folder / path.name).write_bytes(path.read_bytes())
        assert check_tokenizer(folder, 49152) == []
        store.commit(folder, "1" * 64)
    sandbox = TemplateSandbox()
    own = await AdapterTokenizers(lambda: base, store, sandbox).of("1" * 64, Traits(tokenizer=True, chat_template=True))
    assert own.backend is not base.backend and own.special_tokens == base.special_tokens
    assert own.special_ids >= base.special_ids
    messages = [
        {"role": "user", "content": "Grüße, <|im_end|> 世界! 👩‍👩‍👧"},
        {"role": "assistant", "content": "Well, "},
    ]
    for continue_final in (False, True):
        conversation = Conversation(messages, continue_final=continue_final)
        assert await own.render(conversation, 8192) == await base.render(conversation, 8192)
    assert await own.encode(messages[0]["content"], 8192) == await base.encode(messages[0]["content"], 8192)
    await sandbox.close()
