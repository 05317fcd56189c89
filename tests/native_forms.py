"""The C++ for processors that have less than this one."""

import ctypes
from collections.abc import Iterator

import pytest

from adapters.kernels.compiled import NativeUnavailable, build
from server.model import packed_linear
from server.model.cpu import library

NO_TILES = ("-mno-amx-tile", "-mno-amx-bf16")
NO_BF16 = (*NO_TILES, "-mno-avx512f")
FORMS: dict[str, tuple[str, ...]] = {"own": (), "no matrix unit": NO_TILES, "no bf16 arithmetic": NO_BF16}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """ops.cpp in one of its forms, for the modules that are made in the test."""
    try:
        built = build(library.SOURCE, flags=FORMS[request.param])
    except NativeUnavailable as unavailable:
        if request.param == "own" and "no C++ compiler" not in str(unavailable):
            raise
        pytest.skip(f"these flags are of compilers for x86: {unavailable}")
    monkeypatch.setattr(library, "_library", lambda: ctypes.CDLL(str(built)))
    monkeypatch.setattr(packed_linear, "multiplies_bf16", lambda: True)  # oneDNN is not to take its place
    library.function.cache_clear()
    yield request.param
    library.function.cache_clear()
