"""Forms of the native code: one source, compiled for different instruction sets of a processor.

`FORMS` lists all forms, best first. In every form a row's result is bit-identical whatever else is in the batch; two
forms may differ in their last bits. The environment variable `LORAPLEX_NATIVE` forces a form by its name, or `none` for
torch without any native code, for debugging.
"""

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PREBUILT = Path(__file__).with_name("prebuilt")  # in a wheel, compiled libraries in one folder for each form
FORCED = "LORAPLEX_NATIVE"
NONE = "none"

_AVX2 = ("avx2", "fma", "f16c", "bmi1", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_AVX512_BF16 = (*_AVX512, "avx512_bf16")
_AMX = (*_AVX512_BF16, "amx_tile", "amx_bf16")


class NativeUnavailable(Exception):
    """There is no native code for this machine; the message gives the reason."""


class FormRefused(Exception):
    """`LORAPLEX_NATIVE` names a form that this machine cannot use; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way to compile the native code.

    `needs` are processor features in the spelling of /proc/cpuinfo; on x86 they are also passed to the compiler.
    `machine` is the required value of `platform.machine()`, or empty for any.
    """

    name: str
    machine: str = ""
    needs: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's flags."""
        if self.machine != "x86_64":
            return ()
        return tuple(f"-m{_COMPILER_NAMES.get(feature, feature)}" for feature in self.needs)


_COMPILER_NAMES = {"bmi1": "bmi", "avx512_bf16": "avx512bf16", "amx_tile": "amx-tile", "amx_bf16": "amx-bf16"}

FORMS = (
    Form("amx", "x86_64", _AMX),
    Form("avx512-bf16", "x86_64", _AVX512_BF16),
    Form("avx512", "x86_64", _AVX512),
    Form("avx2", "x86_64", _AVX2),
    Form("neon", "aarch64", ("asimd",)),
    Form("plain"),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """A form and the reason for its choice."""

    form: Form
    reason: str

    def __str__(self) -> str:
        return f"{self.form.name} ({self.reason})"


@cache
def chosen_form() -> Choice:
    """Return the form that this process uses, and the reason in words for the log.

    Raises `NativeUnavailable` when no form is prebuilt or can be compiled, or `LORAPLEX_NATIVE` is `none`, and
    `FormRefused` when it names a form that this machine cannot use.
    """
    forced = os.environ.get(FORCED, "")
    if forced:
        return Choice(_forced_form(forced), f"{FORCED} forces it")
    passed_over: list[str] = []
    for form in FORMS:
        obstacle = why_not(form)
        if obstacle is None:
            return Choice(form, "; ".join(passed_over) or "the best form there is")
        passed_over.append(f"not {form.name}: {obstacle}")
    raise NativeUnavailable("; ".join(passed_over))


def described_choice() -> str:
    """Describe the form that this process uses, or none, with the reason. Raises `FormRefused`."""
    try:
        return str(chosen_form())
    except NativeUnavailable as unavailable:
        return f"{NONE} ({unavailable})"


def _forced_form(name: str) -> Form:
    if name == NONE:
        raise NativeUnavailable(f"{FORCED}={NONE} switches native code off")
    form = next((form for form in FORMS if form.name == name), None)
    if form is None:
        names = ", ".join([*(form.name for form in FORMS), NONE])
        raise FormRefused(f"{FORCED}={name} names no form; the forms are {names}")
    if obstacle := why_not(form):
        raise FormRefused(f"{FORCED}={name} cannot be used: {obstacle}")
    return form


def why_not(form: Form) -> str | None:
    """Return the reason why this machine cannot use `form`; None when it can."""
    return why_not_run(form) or (None if is_prebuilt(form) else why_not_compiled(form))


def is_prebuilt(form: Form) -> bool:
    """Return whether this installation has `form` compiled, which only wheels do."""
    return (PREBUILT / form.name).is_dir()


def why_not_built(form: Form) -> str | None:
    """Return the reason why a wheel that is built here has no `form`; None when it has it."""
    return _why_not_of_machine(form) or why_not_compiled(form)


def why_not_run(form: Form) -> str | None:
    """Return the reason why this machine cannot run `form`; None when it can."""
    if obstacle := _why_not_of_machine(form):
        return obstacle
    missing = [feature for feature in form.needs if feature not in processor_features()]
    if missing:
        return f"the processor has no {', '.join(missing)}"
    if "amx_tile" in form.needs and not _may_use_tiles():
        return "the kernel does not permit the matrix unit"
    return None


def _why_not_of_machine(form: Form) -> str | None:
    return None if form.machine in ("", platform.machine()) else f"it is for {form.machine}"


def why_not_compiled(form: Form) -> str | None:
    """Return the reason why this machine cannot compile `form`; None when it can."""
    if (found := compiler()) is None:
        return "no C++ compiler was found"
    return None if _accepts(found, form.flags) else f"{found} refuses to compile for it"


def compiler() -> str | None:
    """Return the C++ compiler: the one that `CXX` names, else the first one found; None if there is none."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@cache
def _accepts(compiler: str, flags: Sequence[str]) -> bool:
    command = [compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


@cache
def processor_features() -> frozenset[str]:
    """Return the processor's features in the kernel's spelling; empty where /proc/cpuinfo does not exist."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    listed = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(listed, "").split())


@cache
def _may_use_tiles() -> bool:
    """Request the tile registers from the kernel, which a process has to do once. The kernel may refuse."""
    arch_prctl, request, tile_data = 158, 0x1023, 18  # SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0)
