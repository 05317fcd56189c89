"""Composition root of `loraplex serve`: config → engine, registry, app → uvicorn. No other module constructs these."""

import asyncio
import gc
import json
import logging
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from rich.console import Console

from adapters.errors import AdapterConflict, AdapterError
from adapters.records import PendingAdapter
from adapters.registry.registry import AdapterRegistry
from adapters.sources import NAMED_BY_OPERATOR, copy_from
from adapters.validation.inspect import check_files
from server.api.adapters import fetching
from server.api.adapters.merge import merge
from server.api.adapters.publishing import Publication, audit_publication, publish_from
from server.api.adapters.scrub import Scrubber
from server.api.adapters.watcher import FolderWatcher
from server.api.app import create_app
from server.api.context import AppContext, Startup
from server.api.errors import ApiError
from server.api.middleware.auth import KeyRing, check_bind
from server.api.text.tokenizer import Tokenizer
from server.audit import AuditLog
from server.config import ConfigError, ServeConfig, StartFailed
from server.http.server import HttpServer
from server.ipc.client import AdapterMoveRefused, EngineClient
from server.ipc.supervisor import EngineTransport, EngineUnavailable
from server.metrics import Metrics
from server.start_checks import DEMO_ADAPTERS, describe_failure, named_adapters, refuse_failed
from server.usage import UsageLedger

log = logging.getLogger(__name__)

KEYS_SECONDS = 1.0  # between two looks at the keys file


def run(config: ServeConfig, registry: AdapterRegistry, transport: EngineTransport | None = None) -> None:
    """Serve until a signal ends the server. The engine is behind `transport`; without one, it runs in a thread.

    `config` and `registry` come from `server.launch`. Raises `ConfigError` or `StartFailed`.
    """
    keys = KeyRing.load(config)
    check_bind(config, keys)
    asyncio.run(_serve(config, keys, registry, transport or _thread_transport(config)))


async def _serve(config: ServeConfig, keys: KeyRing, registry: AdapterRegistry, transport: EngineTransport) -> None:
    engine = EngineClient(transport, hang_seconds=config.hang_seconds)
    starting = asyncio.create_task(engine.start())
    try:
        context = AppContext(
            config=config,
            engine=engine,
            registry=registry,
            keys=keys,
            metrics=Metrics(config.served_model_name),
            base_model=config.served_model_name,
            audit=AuditLog(config.data_dir),
            usage=UsageLedger(config.data_dir),
            startup=Startup([name for name, _ in named_adapters(config)]),
        )
        server = Server(context)
        bringing_up = asyncio.create_task(_bring_up(context, starting, server))
        lasting = (_scrub(context), _follow_keys(context), context.history.follow(), context.usage.follow())
        background = [asyncio.create_task(work) for work in lasting]
        try:
            await server.serve()
            if bringing_up.done():
                bringing_up.result()
            bringing_up.cancel()
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await context.usage.flush()
            context.usage.close()
            await context.sandbox.close()
            await context.grammars.close()
            if context.audit is not None:
                await asyncio.to_thread(context.audit.close)
    finally:
        starting.cancel()
        await engine.stop()


def _thread_transport(config: ServeConfig) -> EngineTransport:
    from server.engine.build import build_serving_engine
    from server.engine.thread_transport import ThreadTransport

    return ThreadTransport(lambda: build_serving_engine(config))


class Server(HttpServer):
    """The HTTP server with a graceful shutdown: become unready, drain, exit. A second signal ends the requests that
    still run, and a third one the process."""

    def __init__(self, context: AppContext) -> None:
        super().__init__(create_app(context), context.config.host, context.config.port)
        self._context = context
        self._draining: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    @property
    def url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Exclude the objects that exist now from garbage collection: a full collection would scan every
        imported module and delay every stream."""
        gc.collect()
        gc.freeze()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        elif not self._hurry.is_set():
            self._hurry.set()
        else:
            super().handle_exit(sig, frame)

    async def _drain(self) -> None:
        config = self._context.config
        self._context.draining = True
        log.info("draining %d requests; a second signal ends them", len(self._context.in_flight))
        hurried = asyncio.create_task(self._hurry.wait())
        drained = asyncio.create_task(self._drain_slowly(config.drain_delay, config.drain_timeout))
        await asyncio.wait({hurried, drained}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not drained.done():
            drained.cancel()
            await self._context.drain(0)
        self.should_exit = True

    async def _drain_slowly(self, delay: float, timeout: float) -> None:
        await asyncio.sleep(delay)
        await self._context.drain(timeout)


async def _bring_up(context: AppContext, starting: "asyncio.Task[None]", server: Server) -> None:
    """Wait for the engine, register the adapters of the command line and of the watched folder, merge, become ready and
    print the startup message; then follow the watched folder."""
    folder = context.config.watch_adapters
    watcher = FolderWatcher(context, Path(folder)) if folder else None
    try:
        await starting
        await _use_tokenizer(context)
        await _register_all(context)
        await _restore(context)
        fetching.resume(context)
        await _first_pass(context, watcher)
        await _merge(context)
        context.startup.done = True
    except EngineUnavailable as error:
        server.should_exit = True
        raise StartFailed(str(error)) from error
    except (StartFailed, ConfigError):
        server.should_exit = True
        raise
    while not server.started:
        await asyncio.sleep(0.01)
    _greet(context, server.url)
    if watcher is not None:
        await watcher.run()


async def _register_all(context: AppContext) -> None:
    """Publish the adapters of the command line. Raises `StartFailed` that names all which cannot be, unless the
    operator wants to start without them."""
    failures = []
    context.startup.stage = ""
    for name, folder in named_adapters(context.config):
        try:
            await asyncio.to_thread(check_files, folder)
            await _register(context, name, folder)
        except (AdapterError, AdapterMoveRefused, OSError) as error:
            failures.append(describe_failure(name, folder, error))
            if context.config.adapter_errors == "warn":
                log.warning("adapter of the command line %s", failures[-1])
                await _note_failure(context, name, folder, str(error))
        context.startup.adapters.remove(name)
    refuse_failed(failures, context.config)


async def _note_failure(context: AppContext, name: str, folder: Path, reason: str) -> None:
    """Store the failure where `GET /v1/adapters` shows it."""
    source, created = folder.resolve().as_uri(), int(time.time())
    failed = PendingAdapter(name, source, replacing=True, pinned=False, created=created, error=reason)
    with suppress(AdapterConflict):
        await asyncio.to_thread(context.registry.remember, failed)


async def _first_pass(context: AppContext, watcher: FolderWatcher | None) -> None:
    if watcher is not None:
        context.startup.stage = "the folder of --watch-adapters is read"
        await watcher.first_pass()


async def _follow_keys(context: AppContext) -> None:
    """Read the keys file again when it changes, and on SIGHUP. Without a file, SIGHUP ends the server as usual."""
    if not context.keys.has_file:
        return
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), KEYS_SECONDS)
        if asked.is_set() or await asyncio.to_thread(lambda: context.keys.is_outdated):
            asked.clear()
            try:
                context.keys.reload()
                log.info("the API keys were read again")
                if context.audit is not None:
                    context.audit.changed("operator", "reload keys")
            except ConfigError as error:
                log.error("%s; the keys stay as they were", error)
            context.follow_keys()


async def _scrub(context: AppContext) -> None:
    if context.config.scrub_mb_per_second:
        await Scrubber(context, context.config.scrub_mb_per_second).run()


async def _use_tokenizer(context: AppContext) -> None:
    info = context.engine.info
    assert info is not None and info.tokenizer is not None
    context.base_tokenizer = await asyncio.to_thread(Tokenizer.of, info.tokenizer)


async def _register(context: AppContext, name: str, folder: Path) -> None:
    """Publish an adapter of the command line. Unchanged bytes change nothing."""
    source, max_bytes = folder.resolve().as_uri(), context.config.max_upload_bytes

    async def fill(staged: Path) -> Publication:
        await asyncio.to_thread(copy_from, source, NAMED_BY_OPERATOR, staged, max_bytes=max_bytes)
        return Publication(name, source, replace=True)

    try:
        audit_publication(context, "command line", await publish_from(context, fill))
    except AdapterMoveRefused as refused:
        if name not in context.registry:  # its self-test could not be run
            raise
        log.warning("adapter %s has a new version, which could not be pinned: %s", name, refused)


async def _restore(context: AppContext) -> None:
    for record in context.registry.walk():
        context.metrics.add_adapter(record.name)
        if record.pinned:
            try:
                await context.engine.pin_adapter(record.version.digest, True)
            except AdapterMoveRefused as refused:
                log.warning("adapter %s could not be pinned again: %s", record.name, refused)
    for name, reason in context.registry.damaged.items():
        log.warning("adapter %s cannot be served: %s", name, reason)


async def _merge(context: AppContext) -> None:
    """Merge the adapter of --merge. Raises `StartFailed`."""
    name = context.config.merge
    if not name:
        return
    context.startup.stage = f"the adapter '{name}' is merged"
    try:
        await merge(context, context.registry.resolve(name), drain=True, allow_requantize=False)
    except (AdapterError, ApiError, AdapterMoveRefused) as error:
        raise StartFailed(f"--merge {name} failed: {error}") from error


def _greet(context: AppContext, url: str) -> None:
    records, _ = context.registry.records(limit=3)
    lines = [
        f"[bold green]Loraplex is ready[/] at [bold]{url}[/] "
        f"({context.base_model}, {len(context.registry)} adapters)\n",
        f"The console is at {url}/ in a browser; programs use the API:\n",
        _chat_line(context, url, context.base_model, "What is the capital of France?"),
    ]
    if records:
        lines.append(_chat_line(context, url, records[-1].name, _DEMO_QUESTIONS.get(records[-1].name, "Hello!")))
    if context.config.demo:
        lines.append(_upload_line(context, url))
    lines.append("Stop the server with Ctrl-C.")
    Console(soft_wrap=True, highlight=False).print("\n".join(lines))


_DEMO_QUESTIONS = {
    "extract-json": "Extract: Maria Lopez moved to Lisbon on 3 May 2021.",
    "pirate": "How do I boil an egg?",
    "sql": "Table employees(name, salary, city). Who earns more than 5000?",
}


def _authorization(context: AppContext) -> str:
    return ' -H "Authorization: Bearer $LORAPLEX_API_KEY"' if context.keys else ""


def _chat_line(context: AppContext, url: str, model: str, question: str) -> str:
    body = {"model": model, "temperature": 0, "max_tokens": 48, "messages": [{"role": "user", "content": question}]}
    return (
        f"curl {url}/v1/chat/completions{_authorization(context)} "
        f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
    ).replace("[", "\\[")


def _upload_line(context: AppContext, url: str) -> str:
    folder = DEMO_ADAPTERS / "pirate"
    return (
        f"curl {url}/v1/adapters{_authorization(context)} -F name=my-pirate "
        f"-F adapter_config.json=@{folder}/adapter_config.json "
        f"-F adapter_model.safetensors=@{folder}/adapter_model.safetensors\n"
    )
