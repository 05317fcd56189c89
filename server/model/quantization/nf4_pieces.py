"""Quantization to 4 bits on a CPU in pieces. bitsandbytes quantizes a weight as a whole there, with float32 and integer
copies of it, which takes about eight times the weight's memory; the blocks of a weight do not depend on each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PIECE = 1 << 18  # elements; a multiple of every block size


@contextmanager
def quantized_in_pieces() -> Iterator[None]:
    """Let bitsandbytes quantize weights on a CPU in pieces, with the same bits, until the context ends. Weights on
    other devices are quantized as before."""
    import bitsandbytes.functional as functional

    whole = functional.quantize_4bit

    def quantize(a: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if arguments or a.device.type != "cpu" or a.numel() <= PIECE or not options.get("compress_statistics"):
            return whole(a, *arguments, **options)
        return _quantize(functional, a, **options)

    functional.quantize_4bit = quantize
    try:
        yield
    finally:
        functional.quantize_4bit = whole


def _quantize(
    functional: Any, a: torch.Tensor, blocksize: int | None, quant_type: str, quant_storage: torch.dtype, **_: Any
) -> Any:
    """Return what `bitsandbytes.functional.quantize_4bit` returns with compressed statistics."""
    blocksize = blocksize or 64
    pieces = [
        torch.ops.bitsandbytes.quantize_4bit.default(piece, blocksize, quant_type, quant_storage)
        for piece in torch.split(a.reshape(-1), PIECE)
    ]
    packed, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    offset = absmax.mean()
    scales, nested = functional.quantize_blockwise(absmax - offset, blocksize=256)
    state = functional.QuantState(
        absmax=scales,
        shape=a.shape,
        dtype=a.dtype,
        blocksize=blocksize,
        code=functional.get_4bit_type(quant_type, device=a.device),
        quant_type=quant_type,
        offset=offset,
        state2=nested,
    )
    return packed, state
