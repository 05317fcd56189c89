"""Random operations by many clients against a whole server, each answer judged by the model of the right ones."""

import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from load_tests.right_answers import ABSENT, Name, State
from load_tests.world import CUT, SLOTS, Answer, Asked, Mismatch, World, found_state
from tests.fixtures.timing import patience
from tests.fixtures.tiny_server import sse_events

LENGTHS = (8, 24, 64)
STATUS_OF = {"overloaded_error": 503, "invalid_request_error": 404, "conflict": 409}  # of events that end a stream
PROMPTS = ((40, 41, 42), tuple(range(60, 100)), (7,) * 17)
SCALES = (1.0, 0.5)


class Client:
    """One of the clients, with a sequence of operations that its seed determines."""

    def __init__(self, world: World, seed: str):
        self._world = world
        self._rng = random.Random(seed)
        self._http = world.server.client()
        self._operations: dict[Callable[[], str], int] = {
            self.infer: 24, self.stream: 18, self.compose: 10, self.abort: 10, self.ask_base: 5,
            self.publish: 16, self.roll_back: 6, self.delete: 5, self.cut_upload: 2, self.publish_broken: 1,
            self.load: 5, self.unload: 5, self.pin: 5, self.unpin: 4, self.merge: 1, self.unmerge: 1,
        }  # fmt: skip

    def close(self) -> None:
        self._http.close()

    def act(self, crash: bool) -> None:
        operation = self._rng.choices(list(self._operations), list(self._operations.values()))[0]
        if crash:
            operation = self.crash
        started = time.monotonic()
        try:
            outcome = operation()
        except (Mismatch, httpx.HTTPError, OSError, AssertionError) as error:
            if not isinstance(error, httpx.TransportError | OSError) or CUT not in self._world.explained(started):
                raise Mismatch(f"{operation.__name__}: {error!r}") from error
            outcome = f"503 {CUT}"
        self._world.counts[f"{operation.__name__} {outcome.split()[0]}"] += 1
        self._world.log.append(f"{started:.3f} to {time.monotonic():.3f} {operation.__name__} {outcome}")
        if outcome.startswith("503"):
            self._world.wait_for_engine()

    # -- inference -----------------------------------------------------------------------------------------------

    def infer(self) -> str:
        return self._complete(self._ask(1))

    def compose(self) -> str:
        return self._complete(self._ask(2))

    def ask_base(self) -> str:
        return self._complete(self._ask(0))

    def stream(self) -> str:
        return self._stream(self._ask(1), stop_after=None)

    def abort(self) -> str:
        return self._stream(self._ask(1), stop_after=self._rng.randrange(8))

    def _ask(self, adapters: int) -> Asked:
        names = self._rng.sample(self._world.names, adapters)
        scales = [1.0 if adapters == 1 else self._rng.choice(SCALES) for _ in names]
        parts = tuple(zip(names, scales, strict=True))
        return Asked(parts, self._rng.choice(PROMPTS), self._rng.choice(LENGTHS), time.monotonic())

    def _complete(self, asked: Asked) -> str:
        return self._judge(asked, Answer.of(self._http.post("/v1/completions", json=asked.body(stream=False))))

    def _stream(self, asked: Asked, stop_after: int | None) -> str:
        text = fingerprint = ""
        with self._http.stream("POST", "/v1/completions", json=asked.body(stream=True)) as response:
            if response.status_code != 200:
                response.read()
                return self._judge(asked, Answer.of(response))
            for number, event in enumerate(sse_events(response.iter_lines())):
                if number == stop_after:
                    return self._judge(asked, Answer(200, None, text=text, fingerprint=fingerprint, complete=False))
                if event is None:
                    break
                if "error" in event:
                    status = STATUS_OF.get(event["error"]["type"], 500)
                    return self._judge(asked, Answer(status, event["error"]["code"], event["error"]["message"]))
                text += event["choices"][0]["text"]
                fingerprint = event["system_fingerprint"]
        return self._judge(asked, Answer(200, None, text=text, fingerprint=fingerprint))

    def _judge(self, asked: Asked, answer: Answer) -> str:
        named = f"{answer.status} {answer.code or ''} {[(name.text, scale) for name, scale in asked.parts]}"
        succeeded = answer.status == 200
        if not (self._is_right(asked, answer) if succeeded else answer.code in self._allowed_codes(asked)):
            states = {name.text: name.possible(asked.since) for name, _ in asked.parts}
            sent = asked.body(stream=False)
            raise Mismatch(f"{named}: {sent} at {asked.since:.3f} was answered {answer}; possible were {states}")
        return named

    def _is_right(self, asked: Asked, answer: Answer) -> bool:
        """The whole text, or the beginning of it, of a version that was current; the one that the answer names."""
        for parts in asked.right():
            if len({part.digest for part in parts}) < len(parts):
                continue  # refused
            text = self._world.answers.text(parts, asked.prompt, asked.length)
            matches = text == answer.text if answer.complete else text.startswith(answer.text)
            named = len(parts) != 1 or not answer.fingerprint or answer.fingerprint.endswith(parts[0].digest[:12])
            if matches and named:
                return True
        return False

    def _allowed_codes(self, asked: Asked) -> set[str]:
        """Of the errors that the model foresees for this request."""
        world, codes = self._world, self._world.explained(asked.since)
        if any(ABSENT in name.possible(asked.since) for name, _ in asked.parts):
            codes |= {"model_not_found", "aborted"}
        for parts in asked.right() if len(asked.parts) > 1 else ():
            digests = {part.digest for part in parts}
            if len(digests) < len(parts):
                codes.add("invalid_value")
            if len(digests | world.pinned(asked.since)) > SLOTS:
                codes.add("no_room")
        return codes

    # -- changes of a name ---------------------------------------------------------------------------------------

    def publish(self) -> str:
        name, digest = self._name(), self._rng.choice(list(self._world.answers.folders))
        replace = self._rng.random() < 0.8

        def outcomes(before: State) -> dict[int, State]:
            if digest == before.current:
                return {200: before}
            if before.current and not replace:
                return {409: before}
            return _moved(201, before.published(digest))

        return self._change(name, outcomes, lambda: self._upload(name, self._world.answers.folders[digest], replace))

    def roll_back(self) -> str:
        name = self._name()

        def outcomes(before: State) -> dict[int, State]:
            if before == ABSENT:
                return {404: before}
            after = before.rolled_back()
            return {409: before} if after is None else _moved(200, after)

        return self._change(name, outcomes, lambda: self._post(name, "rollback"))

    def delete(self) -> str:
        name, drain = self._name(), self._rng.choice((0, 0.05, 10))
        send = lambda: self._http.delete(f"/v1/adapters/{name.text}", params={"drain_timeout": drain})  # noqa: E731
        return self._change(name, lambda before: {404 if before == ABSENT else 200: ABSENT}, send)

    def pin(self) -> str:
        """May be refused while slots are in use; how many pins there are is judged when all is quiet."""
        name = self._name()

        def outcomes(before: State) -> dict[int, State]:
            return {404: before} if before == ABSENT else {200: before._replace(pinned=True), 409: before}

        return self._change(name, outcomes, lambda: self._post(name, "pin"))

    def unpin(self) -> str:
        name = self._name()

        def outcomes(before: State) -> dict[int, State]:
            return {404: before} if before == ABSENT else {200: before._replace(pinned=False)}

        return self._change(name, outcomes, lambda: self._post(name, "unpin"))

    def publish_broken(self) -> str:
        name = self._name()
        return self._change(name, lambda before: {422: before}, lambda: self._upload(name, self._world.broken, True))

    def _change(
        self, name: Name, outcomes: Callable[[State], dict[int, State]], send: Callable[[], httpx.Response]
    ) -> str:
        """Change a name, alone, to what the model says for the answer's status."""
        with name.lock:
            before, since = name.state, time.monotonic()
            after = outcomes(before)
            name.begin(after.values())
            try:
                response = send()
            except httpx.TransportError as error:
                response = httpx.Response(599, json={"error": {"code": CUT, "message": repr(error)}})
            said = f"{response.status_code} {name.text} {response.text[:300]}"
            if self._is_explained(response, since):
                state = self._state_after_fault(name)
                if state not in (before, *after.values()):
                    raise Mismatch(f"{said}; a fault left {state} between {before} and {after}")
            elif response.status_code in after:
                state = after[response.status_code]
            else:
                raise Mismatch(f"{said}; expected {after}, before {before}")
            name.settle(state)
            return f"{response.status_code} {name.text} is {_short(state)}"

    def _is_explained(self, response: httpx.Response, since: float) -> bool:
        """Whether a fault is why the server failed."""
        return response.status_code >= 500 and response.json()["error"]["code"] in self._world.explained(since)

    def _state_after_fault(self, name: Name) -> State:
        for _ in patience(f"a response about {name.text}"):
            self._world.wait_for_engine()
            try:
                return found_state(self._http, name)
            except (httpx.TransportError, KeyError):  # the fault goes on
                time.sleep(0.1)
        raise AssertionError

    def _name(self) -> Name:
        return self._rng.choice(self._world.names)

    def _upload(self, name: Name, folder: Any, replace: bool) -> httpx.Response:
        return self._world.server.upload(self._http, name.text, folder, replace=str(replace).lower())

    def _post(self, name: Name, action: str, **body: Any) -> httpx.Response:
        return self._http.post(f"/v1/adapters/{name.text}/{action}", json=body)

    # -- everything else -----------------------------------------------------------------------------------------

    def load(self) -> str:
        return self._move("load", tier=self._rng.choice(("host", "device")))

    def unload(self) -> str:
        return self._move("unload")

    def _move(self, action: str, **body: Any) -> str:
        name, since = self._name(), time.monotonic()
        response = self._post(name, action, **body)
        return self._allow(name, since, response, {200, 409})

    def merge(self) -> str:
        name, since = self._name(), time.monotonic()
        response = self._http.post("/v1/merge", json={"name": name.text, "drain": self._rng.random() < 0.5})
        return self._allow(name, since, response, {200, 409})

    def unmerge(self) -> str:
        return self._allow(None, time.monotonic(), self._http.delete("/v1/merge"), {200})

    def _allow(self, name: Name | None, since: float, response: httpx.Response, statuses: set[int]) -> str:
        """What changes no answer: besides `statuses`, only what a change or a crash meanwhile explains."""
        states = name.possible(since) if name else set()
        allowed = statuses | ({404} if ABSENT in states else set()) | ({422} if len(states) > 1 else set())
        said = f"{response.status_code} {name.text if name else ''} {response.text[:300]}"
        if response.status_code not in allowed and not self._is_explained(response, since):
            raise Mismatch(f"{said}; possible were {states}")
        return f"{response.status_code} {name.text if name else ''}"

    def cut_upload(self) -> str:
        """A connection that ends in the middle of a form."""
        url = httpx.URL(self._world.server.url)
        with socket.create_connection((url.host, url.port or 80)) as connection:
            head = "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            part = '--b\r\nContent-Disposition: form-data; name="adapter_config.json"; filename="x"\r\n\r\n{'
            connection.sendall(f"{head}Content-Length: 100000\r\n\r\n{part}".encode())
            time.sleep(self._rng.random() / 50)
        return "cut"

    def crash(self) -> str:
        self._world.crash(self._http)
        return "killed"


def _moved(status: int, state: State) -> dict[int, State]:
    """A pinned name got another version. Its pin stays behind when there is no slot for that, or no engine."""
    return {status: state} | ({409: state._replace(pinned=False)} if state.pinned else {})


def _short(state: State) -> str:
    return f"{(state.current or 'absent')[:8]} of {[digest[:8] for digest in state.history]}{' pinned' * state.pinned}"


def run_round(clients: Sequence[Client], operations: range, crash_every: int) -> None:
    """Do those operations, whichever client comes first, until all are done. Raises `Mismatch`: the first, since what
    others then see may only follow from it."""
    numbers, taking, failures = iter(operations), threading.Lock(), list[BaseException]()

    def work(client: Client) -> None:
        while not failures:
            with taking:
                number = next(numbers, None)
            if number is None:
                return
            try:
                client.act(crash=number % crash_every == crash_every // 2)
            except BaseException as failure:
                failures.append(failure)

    with ThreadPoolExecutor(len(clients)) as threads:
        for client in clients:
            threads.submit(work, client)
    if failures:
        raise failures[0]
