"""Vector code that numba's compiled functions can call: weighted sums of rows, transposed blocks.

Written in LLVM's own vectors, which LLVM turns into the instructions of any machine (AVX-512, AVX2,
NEON). The same as loops in numba takes two to three times as long: there the sums of a loop go to
memory after every pair of rows, and the words of a block are moved one by one.

The functions take integers (intp); addresses are those of NumPy's `array.ctypes.data`. They check
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["LANES", "SIDE", "transposed_block", "weighted_rows"]

LANES = 64  # bytes of a row at a time
SIDE = 16  # 4-byte words of a block's row

_Function = Callable[..., None]


def weighted_rows(bits: int, kept: Sequence[int]) -> _Function:
    """Weighted sums of LANES neighbouring bytes of several rows, rounded and clipped to bytes.

    Arguments of the function:
    first: address of the bytes of row 0.
    stride: bytes from a row to the next.
    at: the row that the first weight belongs to.
    rows: how many there are; behind the last follows row 0.
    weights: address of int32 weights.
    taps: the number of weights, at least 1.
    into: address of the result: one uint8 for each lane i in `kept`, in that order,
        min(max((2^(bits - 1) + sum over t < taps of weight[t] * row[at + t][i]) >> bits, 0), 255).
        The sum must fit in 32 bits.
    """
    from llvmlite import ir
    from numba.extending import intrinsic

    byte, word = ir.IntType(8), ir.IntType(32)
    words = ir.VectorType(word, LANES)

    def every(value: int) -> Any:
        return ir.Constant(words, [value] * LANES)

    def generate(b: Any, *arguments: Any) -> None:
        first, stride, at, rows, weights, taps, into = arguments

        def number(value: int) -> Any:
            return ir.Constant(first.type, value)

        before = b.block
        loop, end = b.append_basic_block("taps"), b.append_basic_block("sums")
        b.branch(loop)
        b.position_at_end(loop)
        tap, row, sums = b.phi(first.type), b.phi(first.type), b.phi(words)
        pixels = _load(b, ir.VectorType(byte, LANES), b.add(first, b.mul(row, stride)))
        weight = _load(b, word, b.add(weights, b.mul(tap, number(4))))
        lane = b.insert_element(ir.Constant(words, ir.Undefined), weight, ir.Constant(word, 0))
        weight = b.shuffle_vector(lane, lane, every(0))
        added = b.add(sums, b.mul(b.zext(pixels, words), weight))
        next_tap, next_row = b.add(tap, number(1)), b.add(row, number(1))
        next_row = b.select(b.icmp_signed("==", next_row, rows), number(0), next_row)
        for value, at_first, later in (
            (tap, number(0), next_tap),
            (row, at, next_row),
            (sums, every(1 << (bits - 1)), added),
        ):
            value.add_incoming(at_first, before)
            value.add_incoming(later, loop)
        b.cbranch(b.icmp_signed("<", next_tap, taps), loop, end)

        b.position_at_end(end)
        result = b.ashr(added, every(bits))
        result = b.select(b.icmp_signed(">", result, every(0)), result, every(0))
        result = b.select(b.icmp_signed("<", result, every(255)), result, every(255))
        result = b.trunc(result, ir.VectorType(byte, LANES))
        lanes = ir.Constant(ir.VectorType(word, len(kept)), list(kept))
        _store(b, b.shuffle_vector(result, result, lanes), into)

    @intrinsic  # numba counts the arguments here
    def weighted(
        _: Any, first: Any, stride: Any, at: Any, rows: Any, weights: Any, taps: Any, into: Any
    ) -> Any:
        return _typed(7, generate)

    return weighted


def transposed_block() -> _Function:
    """SIDE x SIDE words of 4 bytes, rows for columns.

    Arguments of the function: address of the first row, bytes from a row to the next, and both of
    the result, which lies elsewhere.
    """
    from llvmlite import ir
    from numba.extending import intrinsic

    words = ir.VectorType(ir.IntType(32), SIDE)

    def shuffle(half: int) -> Any:
        """Words of two rows in turn: of their first or of their second halves."""
        picked = range(half * SIDE // 2, (half + 1) * SIDE // 2)
        return ir.Constant(words, [word for k in picked for word in (k, SIDE + k)])

    def generate(b: Any, first: Any, stride: Any, into: Any, into_stride: Any) -> None:
        def address(begin: Any, step: Any, row: int) -> Any:
            return b.add(begin, b.mul(step, ir.Constant(first.type, row)))

        rows = [_load(b, words, address(first, stride, row)) for row in range(SIDE)]
        for _ in range(SIDE.bit_length() - 1):  # a perfect shuffle per bit of the index
            pairs = zip(rows[: SIDE // 2], rows[SIDE // 2 :], strict=True)
            rows = [b.shuffle_vector(*pair, shuffle(half)) for pair in pairs for half in (0, 1)]
        for row, value in enumerate(rows):
            _store(b, value, address(into, into_stride, row))

    @intrinsic
    def transposed(_: Any, first: Any, stride: Any, into: Any, into_stride: Any) -> Any:
        return _typed(4, generate)

    return transposed


def _load(b: Any, kind: Any, address: Any) -> Any:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1)


def _store(b: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def _typed(num_arguments: int, generate: Callable[..., None]) -> tuple[Any, Callable[..., Any]]:
    """What numba's `intrinsic` wants: the signature and the code, which `generate` makes with the
    function's builder and arguments."""
    from numba import types

    def code(context: Any, builder: Any, _signature: Any, arguments: Sequence[Any]) -> Any:
        generate(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.intp] * num_arguments), code
