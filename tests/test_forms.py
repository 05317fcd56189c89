"""The choice among the forms of the native code, and the native code itself in each of them."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from adapters.device import cpp_build as compiled
from adapters.device import forms
from adapters.device.forms import FORCED, FORMS, NONE, Form, FormRefused, NativeUnavailable, chosen_form
from adapters.kernels import cpu as native
from server.model.cpu import library
from tests.fixtures.native_forms import NAMES, forget, form_named, skip_unless_it_runs

SOURCES = [native.SOURCE, library.SOURCE]
CHECKS = Path(__file__).parent / "native" / "checks.cpp"
ARM_COMPILER = "aarch64-linux-gnu-g++"


@pytest.fixture(autouse=True)
def choosing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set up a compiler that accepts everything, with no forced form and empty caches."""
    monkeypatch.delenv(FORCED, raising=False)
    monkeypatch.setattr(forms, "_accepts", lambda *_: True)
    monkeypatch.setattr(forms, "compiler", lambda: "/usr/bin/c++")
    forget()


@pytest.fixture(autouse=True)
def forgetting() -> object:
    yield
    forget()


def on_a_processor(monkeypatch: pytest.MonkeyPatch, machine: str, *features: str, tiles: bool = True) -> None:
    monkeypatch.setattr(forms.platform, "machine", lambda: machine)
    monkeypatch.setattr(forms, "processor_features", lambda: frozenset(features))
    monkeypatch.setattr(forms, "_may_use_tiles", lambda: tiles)


HASWELL = ("sse2", "avx", "avx2", "fma", "f16c", "bmi1", "bmi2")
SKYLAKE = (*HASWELL, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
ICE_LAKE = (*SKYLAKE, "avx512_vnni", "avx512_vbmi2")
ZEN_4 = (*ICE_LAKE, "avx512_bf16")
SAPPHIRE_RAPIDS = (*ZEN_4, "amx_tile", "amx_bf16", "amx_int8")


@pytest.mark.parametrize(
    ("machine", "features", "name"),
    [
        ("x86_64", ("sse2", "avx"), "plain"),
        ("x86_64", HASWELL, "avx2"),
        ("x86_64", tuple(f for f in SKYLAKE if f != "avx512vl"), "avx2"),
        ("x86_64", SKYLAKE, "avx512"),
        ("x86_64", ICE_LAKE, "avx512"),
        ("x86_64", ZEN_4, "avx512-bf16"),
        ("x86_64", SAPPHIRE_RAPIDS, "amx"),
        ("x86_64", tuple(f for f in SAPPHIRE_RAPIDS if not f.startswith("amx")), "avx512-bf16"),
        ("aarch64", ("fp", "asimd"), "neon"),
        ("riscv64", (), "plain"),
        ("x86_64", (), "plain"),
    ],
)
def test_a_processor_gets_the_best_form_that_it_can_run(
    machine: str, features: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_processor(monkeypatch, machine, *features)
    assert chosen_form().form.name == name


def test_the_reason_names_what_the_better_forms_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor(monkeypatch, "x86_64", *SKYLAKE)
    assert "not avx512-bf16: the processor has no avx512_bf16" in str(chosen_form())


def test_where_the_kernel_does_not_permit_the_matrix_unit_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor(monkeypatch, "x86_64", *SAPPHIRE_RAPIDS, tiles=False)
    assert chosen_form().form.name == "avx512-bf16"
    assert "does not permit" in chosen_form().reason


def test_an_older_compiler_gets_an_older_form(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor(monkeypatch, "x86_64", *SAPPHIRE_RAPIDS)
    monkeypatch.setattr(forms, "_accepts", lambda _, flags: "-mavx512bf16" not in flags)
    assert chosen_form().form.name == "avx512"
    assert "refuses to compile" in chosen_form().reason


@pytest.mark.parametrize("name", ["avx512", "avx2", "plain"])
def test_a_form_can_be_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor(monkeypatch, "x86_64", *SAPPHIRE_RAPIDS)
    monkeypatch.setenv(FORCED, name)
    assert chosen_form().form.name == name and FORCED in chosen_form().reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [("amx", "has no .*amx_tile"), ("neon", "for aarch64"), ("sse9", "the forms are amx, avx512-bf16")],
)
def test_a_form_that_cannot_be_used_is_refused(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor(monkeypatch, "x86_64", *SKYLAKE)
    monkeypatch.setenv(FORCED, name)
    with pytest.raises(FormRefused, match=reason):
        chosen_form()


def test_native_code_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, NONE)
    with pytest.raises(NativeUnavailable):
        chosen_form()
    assert forms.described_choice() == f"none ({FORCED}=none switches native code off)"


def test_a_form_needs_all_that_a_lesser_one_needs() -> None:
    """The table is therefore ordered by decreasing requirements."""
    on_x86 = [form for form in FORMS if form.machine == "x86_64"]
    for better, lesser in itertools.pairwise(on_x86):
        assert set(better.needs) > set(lesser.needs)


# -- forms that a wheel has compiled -----------------------------------------------------------------------------------


@pytest.fixture
def of_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Sapphire Rapids with a wheel that has two forms prebuilt, and without a compiler."""
    on_a_processor(monkeypatch, "x86_64", *SAPPHIRE_RAPIDS)
    monkeypatch.setattr(forms, "compiler", lambda: None)
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    for module in (forms, compiled):
        monkeypatch.setattr(module, "PREBUILT", tmp_path)
    for name in ("avx2", "plain"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_without_a_compiler_the_best_prebuilt_form_is_used(of_a_wheel: Path) -> None:
    assert chosen_form().form.name == "avx2"
    assert "not avx512: no C++ compiler was found" in chosen_form().reason


def test_where_no_prebuilt_form_fits_the_reasons_are_given(of_a_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (of_a_wheel / "plain").rmdir()
    on_a_processor(monkeypatch, "x86_64", "sse2")
    assert "not avx2: the processor has no avx2" in forms.described_choice()
    assert "not plain: no C++ compiler was found" in forms.described_choice()


def test_a_prebuilt_library_is_that_of_its_sources(of_a_wheel: Path, tmp_path: Path) -> None:
    source, form = tmp_path / "code.cpp", form_named("plain")
    source.write_text("int one = 1;")
    library = of_a_wheel / compiled.prebuilt_name(source, form)
    library.touch()
    assert compiled.build(source, form) == library
    source.write_text("int one = 2;")
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler"):
        compiled.build(source, form)


# -- the code itself ---------------------------------------------------------------------------------------------------


def compiler_for(form: Form, monkeypatch: pytest.MonkeyPatch) -> str:
    """A compiler that knows the form, whatever this machine runs; the test is skipped where there is none."""
    monkeypatch.undo()
    found = shutil.which(ARM_COMPILER) if form.machine == "aarch64" else forms.compiler()
    if found is None or not forms._accepts(found, form.flags):
        pytest.skip(f"there is no compiler for the form {form.name}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_form_compiles(name: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_named(name)
    monkeypatch.setenv("CXX", compiler_for(form, monkeypatch))
    assert compiled.build(source, form).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_the_checks_in_c_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_named(name)
    compiler = compiler_for(form, monkeypatch)
    skip_unless_it_runs(name)
    libraries = [str(compiled.build(source, form)) for source in SOURCES]
    command = [compiler, "-std=c++17", "-O1", "-fopenmp", str(CHECKS), *libraries, "-o", str(tmp_path / "checks")]
    subprocess.run([*command, *compiled.LIBRARIES, "-lm"], check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    ran = subprocess.run([tmp_path / "checks"], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, [line for line in ran.stdout.splitlines() if not line.endswith("ok")]
