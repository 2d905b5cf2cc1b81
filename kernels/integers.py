"""Whole numbers of the host: triton.cdiv and triton.next_power_of_2 are five Python calls there, each time."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n, which is 1 or more."""
    return 1 << (n - 1).bit_length()
