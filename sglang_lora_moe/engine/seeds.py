"""Counter-based random numbers: a function of seed and position, not of anything drawn before. No torch."""

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that counters times it never repeat


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers with good avalanche."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def derive_seed(seed: int, index: int) -> int:
    """A seed in [0, 2^63) for sample `index` of a request with n > 1; index 0 keeps the request's own."""
    return seed if index == 0 else _mix((_mix(seed & _MASK64) + index * _GOLDEN) & _MASK64) >> 1


def uniform(seed: int, position: int) -> float:
    """u in [0, 1 - 1e-12], a function of seed and output position alone."""
    bits = _mix((_mix(seed & _MASK64) + (position + 1) * _GOLDEN) & _MASK64)
    return min((bits >> 11) * 2.0**-53, 1.0 - 1e-12)
