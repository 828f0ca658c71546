"""A tile of int4 or int8 weights as a GEMM's operand: what a Triton kernel calls in place of a load of 16-bit weights."""

import triton
import triton.language as tl


@triton.jit
def load_wna16(
    w_ptr, scales_ptr, zeros_ptr, row, inside, k, K, BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[BK, BN]: (q - z) * s of the rows `row` int64 [BN] and the inputs k to k + BK, rounded once to DTYPE; rows outside are 0.

    The canonical form of `quantization/wna16.py`: w_ptr uint8 [.., K * BITS / 8], scales and zeros (None: 2^(BITS - 1)) [.., K / GROUP],
    GROUP 0 = one group a row. Columns at K or beyond are not 0 but finite; the other operand is 0 there.
    """
    rk = k + tl.arange(0, BK)
    if BITS == 4:
        rb = k // 2 + tl.arange(0, BK // 2)
        pairs = tl.load(w_ptr + row[:, None] * (K // 2) + rb[None, :], mask=inside[:, None] & (rb < K // 2)[None, :], other=0)
        q = tl.join(pairs & 15, pairs >> 4).reshape(BN, BK)  # low bits first
    else:
        q = tl.load(w_ptr + row[:, None] * K + rk[None, :], mask=inside[:, None] & (rk < K)[None, :], other=0)
    if GROUP == 0:
        at, mask = row[:, None], inside[:, None]
    elif GROUP % BK == 0:  # a tile lies in one group
        at, mask = row[:, None] * (K // GROUP) + k // GROUP, inside[:, None]
    else:
        at, mask = row[:, None] * (K // GROUP) + (rk // GROUP)[None, :], inside[:, None] & (rk < K)[None, :]
    zero = 1 << (BITS - 1)
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.int32)
    # Exact in float32, so that the one rounding is to DTYPE.
    values = (q.to(tl.int32) - zero).to(tl.float32) * tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.trans(values.to(DTYPE))
