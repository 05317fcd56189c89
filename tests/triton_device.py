"""Where Triton kernels run in tests: on the GPU, or in Triton's interpreter where there is none.

Whoever imports Triton first decides: conftest.py imports this module before anything else can. `make test-gpu` runs the
same test files on a GPU.
"""

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # a rounding or two at values near 1


def require_triton() -> None:
    """For the head of a test module: skip it where Triton cannot run, and say why."""
    pytest.importorskip("triton", reason="Triton is not installed; it has wheels for Linux only")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("there is no GPU, and TRITON_INTERPRET=0 forbids the interpreter", allow_module_level=True)
    if INTERPRETED:
        _repair_interpreter()


_originals: dict[str, Any] = {}


def _repair_interpreter() -> None:
    """Three defects of Triton 3.6's interpreter: `tl.dot` of bfloat16 multiplies bit patterns, a cast to bfloat16 cuts
    off where the GPU rounds to nearest, and a loop over a bound that is loaded fails under numpy 2.4, which no longer
    takes `int(array of one element)`."""
    from triton.runtime import interpreter

    if not _originals:
        builder = interpreter.InterpreterBuilder
        _originals.update(dot=builder.create_dot, cast=builder.cast_impl, tensor=interpreter._patch_lang_tensor)
        builder.create_dot, builder.cast_impl = _dot, _cast
        interpreter._patch_lang_tensor = _patch_tensor


def _dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _originals["dot"](builder, _widened(a), _widened(b), *rest)


def _widened(handle: Any) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle(torch.from_numpy(handle.data.copy()).view(torch.bfloat16).float().numpy(), tl.float32)


def _cast(builder: Any, source: Any, target: Any) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
        return _originals["cast"](builder, source, target)
    rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
    return TensorHandle(rounded, tl.bfloat16)


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _originals["tensor"](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
