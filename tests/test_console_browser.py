"""The console in headless Chromium: what a person does with it, on a server with a fake engine."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from server.ipc.messages import Ready
from tests.fixtures.api_server import LiveServer, adapter_files, byte_tokenizer, ids, listening, made_files
from tests.fixtures.browser import AXE, chromium, needs, opened
from tests.test_api_tools import HERMES
from tests.test_auth import ADMIN_KEY, INFER_KEY, ring

pytestmark = pytest.mark.slow

PAGES = ["Overview", "Adapters", "Playground", "Splits", "Merge", "Keys"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def folder_of(path: Path, files: dict[str, bytes]) -> list[Path]:
    """The files of an adapter on disk, as the browser's dialog gives them."""
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return sorted(path.iterdir())


def visit(page: Page, title: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=title, exact=True).click()


def choose(page: Page, button: str, files: list[Path]) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=button).click()
    chooser.value.set_files(files)


def publish(page: Page, files: list[Path], name: str) -> None:
    visit(page, "Adapters")
    choose(page, "Upload…", files)
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_role("button", name="Publish", exact=True).click()


def publish_and_open(page: Page, files: list[Path], name: str) -> None:
    publish(page, files, name)
    expect(page.get_by_text("Published.")).to_be_visible()
    expect(page.get_by_role("dialog")).to_contain_text("selftest")
    page.get_by_role("button", name="Open", exact=True).click()
    expect(page.get_by_role("heading", name=name, level=1)).to_be_visible()


def conversation(page: Page, model: str) -> Locator:
    return page.get_by_role("log", name=f"Conversation with {model}")


def ask(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Prompt", exact=True).press("Enter")


def says(live: LiveServer, text: str) -> None:
    tokenizer = live.context.tokenizer
    live.engine.script = lambda _: ids(tokenizer, text) + live.engine.info.eos_token_ids


def test_upload_chat_compare_replace_under_a_stream_roll_back_and_delete(browser: Browser, tmp_path: Path) -> None:
    first = folder_of(tmp_path / "first", adapter_files(1))
    second = folder_of(tmp_path / "second", made_files(2, r=2))
    with listening(tmp_path / "data") as live, opened(browser, live.url) as page:
        publish_and_open(page, first, "pirate")
        before = page.locator(".lead code").inner_text()

        page.get_by_role("link", name="Try it").click()
        ask(page, "Who are you?")
        for model in ("tiny-base", "pirate"):
            expect(conversation(page, model)).to_contain_text("Hello world")

        live.engine.waits_after = lambda _: 5
        ask(page, "And now?")
        expect(conversation(page, "pirate").locator(".answer").last).to_have_text("Hello")
        page.goto(f"{live.url}/#/adapters/pirate")
        choose(page, "New version…", second)
        page.get_by_role("button", name="Publish", exact=True).click()
        expect(page.get_by_text("Published.")).to_be_visible()
        page.get_by_role("button", name="Open", exact=True).click()
        expect(page.locator(".lead code")).not_to_have_text(before)
        visit(page, "Playground")
        expect(conversation(page, "pirate").locator(".answer").last).to_have_text("Hello")
        live.engine.waits_after = lambda _: float("inf")
        expect(conversation(page, "pirate").locator(".answer").last).to_have_text("Hello world")
        expect(page.locator(".column footer code").last).to_have_text(before)

        page.goto(f"{live.url}/#/adapters/pirate")
        page.get_by_role("button", name="Compare").click()
        expect(page.get_by_role("table").locator(".new").first).to_be_visible()
        page.get_by_role("button", name="Roll back to it").click()
        expect(page.locator(".lead code")).to_have_text(before)

        live.engine.waits_after = lambda _: 5
        visit(page, "Playground")
        ask(page, "Last words?")
        expect(conversation(page, "pirate").locator(".answer").last).to_have_text("Hello")
        page.goto(f"{live.url}/#/adapters/pirate")
        page.get_by_role("button", name="Delete…").click()
        page.get_by_role("button", name="Delete", exact=True).click()
        expect(page.get_by_role("dialog")).to_contain_text("1 requests still run")
        live.engine.waits_after = lambda _: float("inf")
        expect(page.get_by_role("dialog")).to_contain_text("1 running requests finished, 0 were aborted")
        page.get_by_role("dialog").get_by_role("button", name="Close").click()
        expect(page.get_by_text("The adapter is deleted.")).to_be_visible()


def test_every_problem_of_a_bad_file_is_shown(browser: Browser, tmp_path: Path) -> None:
    config = json.loads(adapter_files(0)["adapter_config.json"])
    bad = json.dumps({**config, "r": 4000, "use_nothing_of_this": True}).encode()
    files = folder_of(tmp_path / "bad", {**adapter_files(0), "adapter_config.json": bad})
    with listening(tmp_path / "data") as live, opened(browser, live.url) as page:
        publish(page, files, "broken")
        problems = page.get_by_role("alert").locator(".problems li")
        expect(problems.first).to_be_visible()
        answered = live_problems(live, files)
        assert problems.count() == len(answered) > 1
        for problem in answered:
            expect(page.get_by_role("alert")).to_contain_text(problem["where"])
        page.get_by_role("button", name="Cancel").click()
        choose(page, "Upload…", files[:1])
        expect(page.get_by_role("alert")).to_contain_text("There is no adapter_model.safetensors")
        assert "broken" not in live.context.registry


def live_problems(live: LiveServer, files: list[Path]) -> list[dict[str, str]]:
    form = {path.name: (path.name, path.read_bytes()) for path in files}
    answer = httpx.post(f"{live.url}/v1/adapters", data={"name": "x"}, files=form)
    assert answer.status_code == 422
    found: list[dict[str, str]] = answer.json()["error"]["problems"]
    return found


def test_a_key_without_a_scope_sees_what_it_may_not_do(browser: Browser, tmp_path: Path) -> None:
    with listening(tmp_path, keys=ring(tmp_path)) as live, opened(browser, live.url) as page:
        sign_in(page, "wrong")
        expect(page.get_by_role("alert")).to_contain_text("A valid API key is required")
        sign_in(page, INFER_KEY)
        expect(page.get_by_text("This key may not see metrics and statistics.")).to_be_visible()
        for title in ("Adapters", "Splits", "Merge"):
            visit(page, title)
            expect(page.get_by_text("This page needs admin")).to_be_visible()
        visit(page, "Keys")
        expect(page.locator(".scopes .yes")).to_have_count(1)
        expect(page.locator(".scopes .no")).to_have_count(3)
        visit(page, "Playground")
        ask(page, "Hello?")
        expect(conversation(page, "tiny-base")).to_contain_text("Hello world")
        assert page.evaluate("Object.values(localStorage).join() + document.cookie").count(INFER_KEY) == 0
        page.reload()
        expect(page.get_by_role("heading", name="Playground")).to_be_visible()  # the tab keeps its key
        visit(page, "Keys")
        page.get_by_role("button", name="Sign out").click()
        sign_in(page, ADMIN_KEY)
        visit(page, "Keys")
        expect(page.get_by_role("region", name="All keys").get_by_role("row")).to_have_count(
            1 + len(live.context.keys.listed)
        )
        assert INFER_KEY not in page.content()


def sign_in(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()


def test_the_console_survives_an_engine_and_a_server_that_go_and_come_back(browser: Browser, tmp_path: Path) -> None:
    with ExitStack() as served, ExitStack() as tab:
        live = served.enter_context(listening(tmp_path / "first"))
        page = tab.enter_context(opened(browser, live.url))
        expect(page.get_by_role("heading", name="tiny-base")).to_be_visible()

        live.engine.comes_back = False
        live.call(live.engine.die)
        expect(page.get_by_text("Not ready.")).to_be_visible()
        expect(page.get_by_role("heading", name="tiny-base")).to_be_visible()
        live.call(lambda: live.engine._emit(Ready(live.engine.info)))
        expect(page.get_by_text("Not ready.")).to_be_hidden()

        live.context.draining = True  # as a server does that ends; its traces end with it
        served.close()
        expect(page.get_by_text("The server does not answer.")).to_be_visible()
        expect(page.get_by_role("term").filter(has_text="Tokens per second")).to_be_visible()  # what was known stays
        served.enter_context(listening(tmp_path / "second", port=int(live.url.rpartition(":")[2])))
        expect(page.get_by_text("The server does not answer.")).to_be_hidden()
        visit(page, "Adapters")
        expect(page.get_by_text("No adapter yet.")).to_be_visible()


def test_long_lists_are_searched_and_paged(browser: Browser, tmp_path: Path) -> None:
    with listening(tmp_path) as live, opened(browser, live.url) as page:
        for number in range(56):
            publish_in(live, f"team/{number:03}")
        visit(page, "Adapters")
        rows = page.get_by_role("region", name="Adapters").locator("tbody tr")
        expect(rows).to_have_count(50)
        page.get_by_role("button", name="Next").click()
        expect(rows.first).to_contain_text("team/050")
        page.keyboard.press("/")
        page.keyboard.type("/01")
        expect(rows).to_have_count(10)
        page.get_by_role("link", name="team/017").click()
        expect(page.get_by_role("heading", name="team/017")).to_be_visible()


def test_a_split_is_created_moved_and_removed(browser: Browser, tmp_path: Path) -> None:
    with listening(tmp_path) as live, opened(browser, live.url) as page:
        publish_in(live, "stable")
        publish_in(live, "canary", 1)
        visit(page, "Splits")
        page.get_by_label("Name").fill("support")
        for label in ("Stable", "Canary"):
            page.get_by_role("combobox", name=label).fill(label.lower())
            page.get_by_role("option", name=label.lower()).click()
        page.get_by_role("button", name="Create").click()
        split = page.get_by_role("region", name="Split support")
        expect(split.get_by_role("status").filter(has_text="10 %")).to_be_visible()
        slider = split.get_by_label("Share of canary")
        slider.focus()
        for _ in range(5):
            slider.press("ArrowRight")
        split.get_by_role("button", name="Apply").click()
        expect(split.get_by_role("button", name="Apply")).to_be_disabled()
        assert live.context.registry.aliases["support"].weights == {"stable": 85, "canary": 15}
        split.get_by_role("button", name="Remove…").click()
        split.get_by_role("button", name="Remove the split").click()
        expect(page.get_by_text("No split yet.")).to_be_visible()


def test_an_adapter_is_merged_and_unmerged(browser: Browser, tmp_path: Path) -> None:
    with listening(tmp_path) as live, opened(browser, live.url) as page:
        publish_in(live, "mine")
        visit(page, "Merge")
        page.get_by_role("combobox", name="Adapter").fill("mine")
        page.get_by_role("option", name="mine").click()
        page.get_by_role("button", name="Merge", exact=True).click()
        expect(page.get_by_text("Merged", exact=True)).to_be_visible()
        page.get_by_role("button", name="Restore the base model").click()
        expect(page.get_by_text("No adapter is merged")).to_be_visible()


def test_the_playground_shows_probabilities_calls_json_and_code(browser: Browser, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(HERMES)
    with listening(tmp_path, tokenizer=tokenizer) as live, opened(browser, live.url) as page:
        visit(page, "Playground")
        page.get_by_label("Show probabilities of tokens").check()
        page.get_by_label("System prompt").fill("Be brief.")
        ask(page, "Hello?")
        tokens = page.get_by_role("group", name="Tokens by probability").locator("span")
        expect(tokens).to_have_count(len("Hello world"))
        assert live.engine.submitted[-1].sampling.logprobs == 5
        tokens.nth(1).click()
        expect(page.locator(".alternatives li")).to_have_count(3)

        page.get_by_label("Show probabilities of tokens").uncheck()
        says(live, '{"answer": 42}')
        ask(page, "As JSON?")
        expect(page.locator(".json .json-value")).to_have_text("42")
        page.get_by_role("button", name="Insert an example").click()
        says(live, '<tool_call>{"name": "get_weather", "arguments": {"city": "Lisbon"}}</tool_call>')
        page.get_by_role("button", name="Clear").click()  # or the context is full
        page.get_by_label("Most tokens").fill("100")
        ask(page, "And the weather?")
        expect(page.locator(".call code").first).to_have_text("get_weather")
        expect(page.locator(".call .json-text")).to_have_text('"Lisbon"')

        page.get_by_role("button", name="Code").click()
        for language, start in {"curl": "curl http://", "Python": "from openai", "Node": "import OpenAI"}.items():
            page.get_by_role("tab", name=language).click()
            page.get_by_role("button", name=f"Copy as {language}").click()
            copied = page.evaluate("navigator.clipboard.readText()")
            assert copied.startswith(start) and "Be brief." in copied and "get_weather" in copied
            expect(page.get_by_role("button", name="Copied")).to_be_hidden()
        compile(page_code(page, "Python"), "copied", "exec")


def page_code(page: Page, language: str) -> str:
    page.get_by_role("tab", name=language).click()
    return page.get_by_role("group", name=f"The request in {language}").inner_text()


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_no_page_has_a_serious_violation_of_accessibility(browser: Browser, tmp_path: Path, look: str) -> None:
    needs(AXE, "npm ci --prefix console")
    with (
        listening(tmp_path) as live,
        opened(browser, live.url, dark=look == "dark", phone=look == "phone") as page,
    ):
        publish_in(live, "mine")
        publish_in(live, "mine", 1)
        live.call(live.context.history.add_point)
        for name in PAGES:
            visit(page, name)
            if name == "Playground":
                page.get_by_label("Show probabilities of tokens").check() if look == "light" else None
                ask(page, "Hello?")
                expect(page.locator(".answer").first).to_contain_text("Hello world")
            assert violations(page) == [], name
        page.goto(f"{live.url}/#/adapters/mine")
        page.get_by_role("button", name="Compare").click()
        expect(page.get_by_role("heading", name="mine", level=1)).to_be_visible()
        assert violations(page) == []
        page.get_by_role("button", name="Delete…").click()
        assert violations(page) == []


def violations(page: Page) -> list[str]:
    """The serious and critical ones of axe-core. It is injected past the page's policy, as the test's own script."""
    page.wait_for_load_state("networkidle") if "overview" not in page.url else None
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']})")
    return [
        f"{one['id']}: {node['html'][:120]} {node.get('failureSummary', '')[:200]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def publish_in(live: LiveServer, name: str, seed: int = 0) -> None:
    form = {file: (file, data) for file, data in adapter_files(seed).items()}
    answer = httpx.post(f"{live.url}/v1/adapters", data={"name": name, "replace": "true"}, files=form)
    assert answer.status_code in (200, 201), answer.text
