"""python -m load_tests.gpu: the benchmark of the GPU path. See docs/performance.md for what it measures.

--smoke            tiny sizes on a CPU, in Triton's interpreter: shows that it runs to its end, measures nothing
--out FOLDER       where the JSON (and, with matplotlib, the PNG) go; default load_tests/results
--minutes N        sections that would begin later than this are left out; default 8
--only PART        one part by itself: of the sections, or correctness, profile, launches (see first_contact.sh)
--lines FILE       where its rows go, one line of JSON for each as soon as it is there
--vllm FOLDER      an unpacked wheel of vLLM, whose LoRA kernels then run beside ours
--sglang FOLDER    the same of SGLang
"""

import argparse
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from load_tests.gpu.setting import Report, Shape


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.gpu", description="The benchmark of the GPU path.")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU: shows that it runs to its end")
    parser.add_argument("--out", type=Path, default=Path("load_tests/results"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--vllm", type=Path, help="folder of an unpacked vLLM wheel")
    parser.add_argument("--sglang", type=Path, help="folder of an unpacked SGLang wheel")
    parser.add_argument("--only", help="one part by itself")
    parser.add_argument("--lines", type=Path, help="file that the rows of --only are appended to, as lines of JSON")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --smoke shows on a CPU that the benchmark runs to its end")
    wheels = {name: path for name in ("vllm", "sglang") if (path := getattr(options, name)) is not None}
    with ExitStack() as stack, torch.no_grad():
        if options.smoke and options.only != "correctness":  # which compares with engines that are not interpreted
            stack.enter_context(interpreted())
        if options.only:
            run_only(options.only, options.smoke, wheels, options.lines)
        else:
            run(options.smoke, options.minutes * 60, wheels, options.out)


@contextmanager
def interpreted() -> Iterator[None]:
    """The GPU path on a CPU, in Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.fixtures.triton_device import DEVICE, require_triton

    require_triton()
    from adapters.kernels.triton_lora import TritonKernel
    from server.model import attention, runner
    from server.model.attention import triton_paged
    from server.model.fused.block_ops import TritonBlockOps

    chosen = lambda *_: (TritonKernel(DEVICE), "interpreted")  # noqa: E731
    attend = lambda *_: (triton_paged.paged_attention, "interpreted")  # noqa: E731
    patches = {
        (runner, "choose_kernel"): chosen,
        (attention, "choose"): attend,
        (runner, "block_ops"): lambda *_: TritonBlockOps(),
    }
    with ExitStack() as stack:
        for (module, name), replacement in patches.items():
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def run(smoke: bool, seconds: float, wheels: dict[str, Path], out: Path) -> None:
    from load_tests.gpu import ceilings, fused, kernels, nf4, writing

    report = new_report(smoke, seconds)
    own, main_shape = report.setting, report.setting.shapes[0]
    parts: list[tuple[str, float, Callable[[], None]]] = [  # with the seconds that there must be for it
        ("ceilings", 0, partial(ceilings.run, report)),
        (f"steps of {main_shape.name}", 120, partial(whole_model, report, main_shape, MODEL_PARTS)),
        ("kernels", 60, partial(kernels.run, report, main_shape, wheels)),
        ("fused", 60, partial(fused.run, report, main_shape)),
        ("nf4", 30, partial(nf4.run, report, main_shape)),
        *((f"steps of {s.name}", 60, partial(whole_model, report, s, MODEL_PARTS)) for s in own.shapes[1:]),
    ]
    for name, needed, part in parts:
        if report.left < needed and not smoke:
            report.note(f"{name} left out: {report.left:.0f} s are left of the time there is")
            continue
        started = time.monotonic()
        part()
        gc.collect()
        if own.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    writing.write(report, out)


def run_only(name: str, smoke: bool, wheels: dict[str, Path], lines: Path | None) -> None:
    """One part by itself, whose rows go to `lines` as they come."""
    from load_tests.gpu import ceilings, correctness, fused, kernels, launches, nf4

    report = new_report(smoke, float("inf"))
    report.lines = lines
    report.resume()
    shape = report.setting.shapes[0]
    parts: dict[str, Callable[[], None]] = {
        "ceilings": partial(ceilings.run, report),
        "correctness": partial(correctness.run, report, interpreted if smoke else nullcontext),
        "kernels": partial(kernels.run, report, shape, wheels),
        "fused": partial(fused.run, report, shape),
        "nf4": partial(nf4.run, report, shape),
        "launches": partial(launches.run, report.setting.device),
        **{part: partial(whole_model, report, shape, [part]) for part in [*MODEL_PARTS, "profile"]},
    }
    parts[name]()


MODEL_PARTS = ["decode", "prefill", "loading", "streams"]


def new_report(smoke: bool, seconds: float) -> Report:
    from load_tests.gpu import setting

    own = setting.smoke() if smoke else setting.full()
    report = setting.Report(own, time.monotonic() + seconds)
    report.note(f"{versions()}, {own.dtype}, rank {own.rank} on all linears, context {own.context}")
    return report


def whole_model(report: Report, shape: Shape, wanted: list[str]) -> None:
    from load_tests.gpu import loading, profiling, steps, streams
    from load_tests.gpu.models import build_runner, record

    runner = build_runner(shape, report.setting)
    graphs = record(runner, report.setting)
    parts: dict[str, Callable[[], None]] = {
        "decode": partial(steps.decode, report, shape, runner, graphs),
        "prefill": partial(steps.prefill, report, shape, runner),
        "loading": partial(loading.run, report, shape, runner, graphs),
        "streams": partial(streams.run, report, shape, runner, graphs),
        "profile": partial(profiling.run, report, shape, graphs),
    }
    for name in wanted:
        parts[name]()


def versions() -> str:
    import transformers
    import triton

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{where}, torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
