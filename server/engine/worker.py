"""The engine process: connects to the parent, builds the engine and runs its loop."""

import gc
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from adapters.fault_points import arm_from_environment, fault_point
from server import config as settings
from server.config import ServeConfig
from server.engine.memory.machine import cpu_quota, schedulable_cores
from server.ipc.messages import Emit, Fatal, FromEngine, Ready, Receive, ToEngine, decode_to_engine, encode
from server.ipc.sockets import address

log = logging.getLogger(__name__)


def main(serve: Callable[[ServeConfig, Receive, Emit], None] | None = None) -> None:
    """Connect to the parent and run `serve` (by default the engine) until it returns."""
    config = settings.load(json.loads(sys.stdin.buffer.readline()))
    folder = sys.argv[1]
    arm_from_environment()
    threading.Thread(target=_exit_with_parent, args=[folder], daemon=True).start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket in (inbox, outbox):
        socket.set_hwm(0)
    inbox.bind(address(Path(folder), "to-engine"))
    outbox.connect(address(Path(folder), "from-engine"))

    def emit(message: FromEngine) -> None:
        fault_point("ipc.to_api")
        outbox.send(encode(message))

    try:
        (serve or _serve)(config, lambda timeout: _take_all(inbox, timeout), emit)
    except Exception:
        log.exception("the engine cannot continue")
        _end_with_error(context, inbox, outbox)
    outbox.close(linger=1000)
    inbox.close(linger=0)


def _end_with_error(context: "zmq.Context[Any]", inbox: "zmq.Socket[bytes]", outbox: "zmq.Socket[bytes]") -> None:
    """Send what was emitted, and end the process without waiting for threads that may never end."""
    outbox.close(linger=1000)
    inbox.close(linger=0)
    context.term()
    os._exit(1)


def _serve(config: ServeConfig, receive: Receive, emit: Emit) -> None:
    _bind_threads(config)
    from server.engine.build import (
        build_serving_engine,  # imports torch, which must come after OpenMP's variables are set
    )
    from server.engine.loop import run_loop
    from server.engine.threads import adaptive_threads
    from server.logs import configure_logging
    from server.model.loading.loader import ModelRefused

    configure_logging(config.log_format)
    fault_point("engine.start")
    try:
        engine, info = build_serving_engine(config)
    except ModelRefused as refused:
        emit(Fatal(str(refused)))
        return
    _keep_steps_short()
    emit(Ready(info))
    if config.threads:  # chosen by the operator
        run_loop(engine, receive, emit)
    else:
        run_loop(engine, receive, emit, adaptive_threads(info.description["device"]))


def _bind_threads(config: ServeConfig) -> None:
    """Bind each thread of the model to a core if the model may use every core. While a thread reads adapters, the
    kernel sometimes woke two threads on one core for a step or two, which then took 300 ms instead of 100. OpenMP reads
    the variable when torch is loaded; an operator's own value takes precedence."""
    if sys.platform != "linux" or config.device == "cuda" or Path("/dev/nvidiactl").exists():
        return
    cores = schedulable_cores()
    has_all = config.threads in (0, cores) and cpu_quota() >= cores and "OMP_NUM_THREADS" not in os.environ
    if has_all:  # several servers with a few threads each would all be bound to the first cores
        os.environ.setdefault("OMP_PROC_BIND", "true")


def _keep_steps_short() -> None:
    """Avoid pauses of steps. A full garbage collection would scan all of torch and transformers and block steps for
    0.3 s. The switch interval lets a step take the interpreter from an adapter reader after 0.5 ms instead of 5 ms."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.0005)


def _take_all(inbox: "zmq.Socket[bytes]", timeout: float) -> list[ToEngine]:
    received: list[ToEngine] = []
    if timeout and not inbox.poll(int(timeout * 1000)):
        return received
    while True:
        try:
            received.append(decode_to_engine(inbox.recv(zmq.NOBLOCK)))
        except zmq.Again:
            break
    if received:
        fault_point("engine.message")
    return received


def _exit_with_parent(folder: str) -> None:
    while os.read(sys.stdin.fileno(), 1):  # not the buffered reader: its lock would outlive the interpreter
        pass
    shutil.rmtree(folder, ignore_errors=True)  # a killed parent could not remove it
    os._exit(0)


if __name__ == "__main__":
    main()
