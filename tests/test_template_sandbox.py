"""Chat templates of adapters: what they make, and what they cannot do."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from server.api.text import template_sandbox, template_worker
from server.api.text.template_sandbox import WORKERS, TemplateFailed, TemplateSandbox
from tests.fixtures.timing import HANG_SECONDS, eventually, wait_for

MESSAGES = [{"role": "system", "content": 'Be brief, "é" <b>.'}, {"role": "user", "content": "hi 😀"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
async def sandbox() -> AsyncIterator[TemplateSandbox]:
    sandbox = TemplateSandbox()
    yield sandbox
    await sandbox.close()


def workers() -> list[psutil.Process]:
    name = Path(template_worker.__file__).name
    return [child for child in psutil.Process().children() if any(name in part for part in child.cmdline())]


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role %}[{{ m['content'] }}]\n  {% endif %}\n{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% break %}{% endfor %}",
        "{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}{{ dict(a=1)}}",
        "{% generation %}{{ messages[0].content | trim | upper }}{% endgeneration %}{{ tools is none }}{{ missing }}",
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ messages[1].content.split(' ') }}",
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ '%s' % 3 }}{% if add_generation_prompt %}go{% endif %}",
    ],
)
async def test_renders_as_transformers_does(sandbox: TemplateSandbox, template: str) -> None:
    context: dict[str, Any] = {"bos_token": "<s>", "tools": None, "documents": None, "add_generation_prompt": True}
    expected, _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True, bos_token="<s>")
    assert await sandbox.render(template, {"messages": MESSAGES, **context}) == expected[0]


async def test_a_template_s_own_refusal_is_told(sandbox: TemplateSandbox) -> None:
    with pytest.raises(TemplateFailed, match="roles must alternate"):
        await sandbox.render("{{ raise_exception('roles must alternate') }}", {})


async def test_compiles_without_rendering(sandbox: TemplateSandbox) -> None:
    await sandbox.check("{{ raise_exception('not now') }}")
    with pytest.raises(TemplateFailed, match="Unexpected end of template"):
        await sandbox.check("{% for x in y %}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'][1].__subclasses__() }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ (messages | attr('__class__')).mro() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ range(10**9) | list }}",
        "{{ '\\ud800' }}",
    ],
)
async def test_nothing_leads_out(sandbox: TemplateSandbox, template: str) -> None:
    with pytest.raises(TemplateFailed) as caught:
        await sandbox.render(template, {"messages": MESSAGES})
    assert str(caught.value).isprintable() and "0x" not in str(caught.value) and len(str(caught.value)) < 1500
    assert await sandbox.render("{{ messages[1].content }}", {"messages": MESSAGES}) == "hi 😀"
    assert len(workers()) == 1  # the same one


@pytest.mark.parametrize("template", [ENDLESS, "{{ 10 ** (10 ** 8) }}", "{% if 0 %}{{ 7 ** (10 ** 8) }}{% endif %}"])
async def test_a_template_that_takes_too_long_is_stopped(
    sandbox: TemplateSandbox, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "RENDER_SECONDS", 0.3)
    with pytest.raises(TemplateFailed, match="takes longer than"):
        await sandbox.render(template, {})
    assert workers() == []
    monkeypatch.setattr(template_sandbox, "RENDER_SECONDS", HANG_SECONDS)
    assert await sandbox.render("again", {}) == "again"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{% set n = namespace(x='x' * 1000) %}{% for i in range(30) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
    ],
)
async def test_memory_is_bounded(sandbox: TemplateSandbox, template: str) -> None:
    with pytest.raises(TemplateFailed, match="memory"):
        await sandbox.render(template, {})
    assert await sandbox.render("again", {}) == "again"


@pytest.mark.parametrize("template", ["{{ 'x' * 5000000 }}", "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}"])
async def test_output_is_bounded(sandbox: TemplateSandbox, template: str) -> None:
    with pytest.raises(TemplateFailed, match="more than 4194304 characters"):
        await sandbox.render(template, {})
    assert len(await sandbox.render("{{ '\x01' * 4194304 }}", {})) == 4194304


async def test_no_template_changes_the_next_one(sandbox: TemplateSandbox) -> None:
    await sandbox.render("{% set range = 1 %}{% set x = 5 %}{% macro dict() %}{% endmacro %}", {"y": 1})
    assert await sandbox.render("{{ range(2) | list }}{{ x }}{{ y }}{{ dict(a=1) }}", {}) == "[0, 1]{'a': 1}"


async def test_questions_share_two_workers(sandbox: TemplateSandbox) -> None:
    assert workers() == []
    answers = await asyncio.gather(*(sandbox.render("{{ i }}", {"i": i}) for i in range(20)))
    assert answers == [str(i) for i in range(20)]
    assert len(workers()) == WORKERS


async def test_a_worker_that_died_costs_one_request(sandbox: TemplateSandbox) -> None:
    await sandbox.render("x", {})
    workers()[0].kill()
    with pytest.raises(TemplateFailed, match="ended its process"):
        await sandbox.render("x", {})
    assert await sandbox.render("x", {}) == "x"


async def test_a_caller_that_leaves_frees_its_worker(sandbox: TemplateSandbox) -> None:
    leaving = [asyncio.create_task(sandbox.render(ENDLESS, {})) for _ in range(WORKERS)]
    await eventually(lambda: len(workers()) == WORKERS and not sandbox._workers._idle)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    assert await sandbox.render("x", {}) == "x"


async def test_workers_see_no_secret_of_the_server(sandbox: TemplateSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_API_KEY", "secret")
    await sandbox.render("x", {})
    assert "LORAPLEX_API_KEY" not in workers()[0].environ()


@pytest.mark.parametrize("template", ["x", ENDLESS])
def test_a_worker_ends_with_the_server(template: str) -> None:
    """Idle or in the middle of a rendering."""
    program = (
        "import asyncio, sys\n"
        "from server.api.text.template_sandbox import TemplateSandbox\n"
        "from tests.test_template_sandbox import workers\n"
        "async def main():\n"
        "    sandbox = TemplateSandbox()\n"
        "    await sandbox.render('x', {})\n"
        "    print(workers()[0].pid, flush=True)\n"
        "    asyncio.ensure_future(sandbox.render(sys.argv[1], {}))\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    server = subprocess.Popen([sys.executable, "-c", program, template], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    with server.stdout as output:
        worker = psutil.Process(int(output.readline()))
        server.send_signal(signal.SIGKILL)
        server.wait()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker's end")
