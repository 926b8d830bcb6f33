"""Device functions that several kernels use: pointers, loads, softcap, and exponents."""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1)  # in targets: a masked row
WORD = tl.constexpr(32)  # columns per word of a sampling mask
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A lower bound on exponents, in log2 units. 2^LOWEST is 0, and LOWEST times a coefficient is finite. With
# -inf that product could be 0 * inf.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def row_pointer(ptr, batch_stride, time_stride, row, T, GROUP: tl.constexpr):
    """Return the pointer to row b * T + t. `row` is int64, because offsets in a batch can exceed 2^31."""
    ptr += (row // T) * batch_stride + (row % T) * time_stride
    if GROUP > 1:
        # The launcher checked that every row is aligned. This hint replaces a specialization on the strides,
        # so all lengths share one variant.
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def known_column(target, V):
    """Return the column of the taken token, or -1 for an id outside the vocabulary.

    It is int32, because a comparison with int64 would make the columns int64.
    """
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


@triton.jit
def is_taken(columns, taken, PARTIAL: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr):
    """Whether each column is `taken`. Without PARTIAL, `columns` are a block's, counted from its start."""
    if PARTIAL:
        found = columns == taken
    else:
        # Column minus GROUP * thread is a constant in the machine code, and a thread compares its constants
        # with one number. `columns == taken` would keep a register per column, in the fused kernel from the
        # statistics to the gradient.
        BLOCK: tl.constexpr = columns.shape[0]
        first = tl.arange(0, BLOCK // (THREADS * GROUP)) * (THREADS * GROUP)
        constants = first[:, None, None] + tl.arange(0, GROUP)[None, None, :]
        remainder = taken - tl.arange(0, THREADS) * GROUP
        found = tl.reshape(constants == remainder[None, :, None], [BLOCK])
    return found


@triton.jit
def is_kept(sampling_mask_ptr, column):
    """Whether the row's sampling mask keeps a column. Column -1 counts as kept."""
    word = tl.load(sampling_mask_ptr + column // WORD, mask=column >= 0, other=-1)
    return (word >> (column & (WORD - 1))) & 1 != 0


@triton.jit
def are_kept(
    sampling_mask_ptr, start, columns, V, PARTIAL: tl.constexpr, THREADS: tl.constexpr, GROUP: tl.constexpr
):
    """Whether the row's sampling mask keeps each column of a block that starts at column `start`.

    A thread loads one word for the GROUP columns that it loads at once. They are in one word, because GROUP
    divides WORD, and WORD divides `start` and THREADS * GROUP.
    """
    BLOCK: tl.constexpr = columns.shape[0]
    groups = tl.arange(0, BLOCK // (THREADS * GROUP)) * (THREADS * GROUP // WORD)
    own = tl.arange(0, THREADS) * GROUP
    index = start // WORD + (groups[:, None] + (own // WORD)[None, :])
    if PARTIAL:
        words = tl.load(sampling_mask_ptr + index, mask=index * WORD < V, other=0)
    else:
        words = tl.load(sampling_mask_ptr + index)
    # The bits of the group become the highest ones. Then one of its tests is a comparison of signs, and LLVM
    # does not find 32 equal tests, which it would turn into a vector at 2 more instructions per column.
    bits = words << (-(own % WORD) + (WORD - GROUP))[None, :]
    kept = (bits[:, :, None] >> (tl.arange(0, GROUP) + (WORD - GROUP))[None, None, :]) & 1 != 0
    return tl.reshape(kept, [BLOCK])


@triton.jit
def load_optional(ptr, row, DTYPE: tl.constexpr):
    if ptr is None:
        x = tl.full((), 0.0, DTYPE)
    else:
        x = tl.load(ptr + row)
    return x


@triton.jit
def store_optional(ptr, row, value):
    if ptr is not None:
        tl.store(ptr + row, value)


@triton.jit
def tanh(x):
    a = tl.abs(x)
    t = tl.exp2(a * (-2 * LOG2E))
    value = (1 - t) / (1 + t)
    if x.dtype != tl.float64:
        # For small a, 1 - t cancels digits, and the series up to a^9 is exact to fp32.
        b = a * a
        series = a * (1 - b * (1 / 3 - b * (2 / 15 - b * (17 / 315 - b * (62 / 2835)))))
        value = tl.where(a < 0.3, series, value)
    return tl.where(x < 0, -value, value)


@triton.jit
def softcapped(z, scale, softcap, CAPPED: tl.constexpr):
    """Return `y`: the softcapped logit if CAPPED, else the raw logit, whose scale is then part of `k`."""
    if CAPPED:
        z = softcap * tanh(z * (scale / softcap))
    return z


@triton.jit
def load_block(
    ptr, columns, V, scale, softcap,
    CAPPED: tl.constexpr, PARTIAL: tl.constexpr, DTYPE: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Load `y` of a block of a row, -inf beyond the vocabulary if PARTIAL. EVICTION: L2 cache policy."""
    if PARTIAL:
        z = tl.load(ptr + columns, mask=columns < V, other=float("-inf"), eviction_policy=EVICTION)
    else:
        z = tl.load(ptr + columns, eviction_policy=EVICTION)
    y = softcapped(z.to(DTYPE), scale, softcap, CAPPED)
    if CAPPED and PARTIAL:
        y = tl.where(columns < V, y, float("-inf"))  # the softcap turned -inf into -softcap
    return y


@triton.jit
def lowest_logit(DTYPE: tl.constexpr):
    """Return the lowest finite number. Running maxima start from it, because -inf - (-inf) is NaN."""
    lowest: tl.constexpr = -1.7976931348623157e308 if DTYPE is tl.float64 else -3.4028234663852886e38
    return tl.full((), lowest, DTYPE)


@triton.jit
def exponent(y, shift, k):
    """Compute `k * (y - shift)`, exactly 0 at the row's maximum `shift` even after compilation.

    `k * y - k * shift` takes one instruction less, but the compiler contracts it to an FMA, whose result at
    the maximum is the rounding error of `k * shift`: up to 2^9 for a mask of -1e10, which overflows exp2.
    `tl.fma` keeps the product from being contracted with later operations: `d - ref_d` of two equal rows is
    exactly 0.
    """
    return tl.fma(y - shift, tl.zeros_like(y) + k, tl.zeros_like(y))


@triton.jit
def logit_factors(
    scale, softcap, temperature_ptr, temperature, row, CAPPED: tl.constexpr, DTYPE: tl.constexpr
):
    """Return `scale`, `softcap` and `k` in the arithmetic's dtype. The distribution is softmax(k * y)."""
    scale = tl.full((), scale, DTYPE)
    softcap = tl.full((), softcap, DTYPE)
    if temperature_ptr is None:
        temperature = tl.full((), temperature, DTYPE)
    else:
        temperature = tl.load(temperature_ptr + row)
    if CAPPED:
        k = 1 / temperature
    else:
        k = scale / temperature
    return scale, softcap, k


@triton.jit
def expm1(x):
    """Compute `exp(x) - 1` without cancellation, by a Taylor series exact to fp64 if |x| < 0.5."""
    r = 1.0 + 0 * x
    for i in tl.static_range(17, 1, -1):
        r = 1.0 + x * r / i
    return tl.where(tl.abs(x) < 0.5, x * r, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """Compute `log(1 + x)` for `x >= 0` with the digits of a small x (Goldberg, 1991, theorem 4)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))
