"""The native code in every form that this machine can run, and without any."""

from collections.abc import Callable, Iterator

import pytest

from adapters.device import cpp_build as compiled
from adapters.device import forms
from adapters.device.forms import FORCED, FORMS, NONE, Form
from server.model import attention
from server.model.cpu import library

CACHES: tuple[Callable[..., object], ...] = (
    forms.chosen_form,
    compiled.load,
    library.function,
    library.why_unavailable,
    attention.choose,
)
NAMES = [form.name for form in FORMS]


def form_named(name: str) -> Form:
    return next(form for form in FORMS if form.name == name)


def skip_unless_it_runs(name: str) -> None:
    """Skip the test by the reason why this machine cannot run the form; tests/test_forms.py compiles it all the
    same."""
    if obstacle := forms.why_not(form_named(name)):
        pytest.skip(f"this machine does not run the form {name}: {obstacle}")


def use_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything that is made from now on use the form `name`, or torch alone for `none`."""
    if name != NONE:
        skip_unless_it_runs(name)
    monkeypatch.setenv(FORCED, name)
    forget()


def forget() -> None:
    """Have the form chosen anew."""
    for cache in CACHES:
        cache.cache_clear()  # type: ignore[attr-defined]


@pytest.fixture(params=NAMES)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the form that the modules which the test makes are computed by: each in its turn."""
    use_form(request.param, monkeypatch)
    yield request.param
    forget()


@pytest.fixture(params=[*NAMES, NONE])
def form_or_none(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As `form`, and once more without native code."""
    use_form(request.param, monkeypatch)
    yield request.param
    forget()


@pytest.fixture
def native() -> str:
    """The name of the form that this process uses; tests of native code are skipped where there is none."""
    try:
        return forms.chosen_form().form.name
    except forms.NativeUnavailable as unavailable:
        pytest.skip(f"there is no native code: {unavailable}")
