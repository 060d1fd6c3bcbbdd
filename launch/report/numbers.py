"""Numbers for people: a few characters for any value, so that every one fits its tile, axis and table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Form = Callable[[float, int], str]
"""(value, significant digits) -> text."""

NOT_FINITE = "not finite"
_SIZES = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


def compact(value: float, digits: int = 3) -> str:
    """`0.0006`, `2.41`, `1,234`, `549,123`, `1.2M`, `3.4e-09`: eight characters or fewer with three digits."""
    if not math.isfinite(value):
        return NOT_FINITE
    size = abs(value)
    if size >= 999_999.5:
        rounded = float(f"{value:.{digits}g}")
        if abs(rounded) >= 1e15:
            return _exponential(value, digits)
        unit, letter = next((u, letter) for u, letter in _SIZES if abs(rounded) >= u)
        return f"{_plain(rounded / unit, digits)}{letter}"
    if size >= 1000 or value == int(value):
        return f"{value:,.{max(0, digits - 6)}f}" if value != int(value) else f"{value:,.0f}"
    if size >= 1e-2:
        return _plain(value, digits)
    return _plain(value, digits - 1) if size >= 1e-4 else _exponential(value, digits)


def percent(value: float, digits: int = 3) -> str:
    """`0 %`, `3.4 %`, `56 %`; never 0 or 100 for what is a little beside it."""
    if not math.isfinite(value):
        return NOT_FINITE
    hundredths = 100 * value
    if abs(hundredths) >= 1000:
        return f"{compact(hundredths, digits)} %"
    first = digits - 3 if value == 0 or abs(value) >= 0.0995 else digits - 2
    for decimals in range(first, first + 3):
        text = f"{hundredths:.{decimals}f}"
        if float(text) not in (0, 100) or float(text) == hundredths:
            return f"{text} %"
    return "< 0.01 %" if abs(hundredths) < 1 else "> 99.99 %" if hundredths < 100 else "> 100 %"


def fixed(value: float, decimals: int) -> str:
    """With so many decimals, as a line of a log has them, but short where the value is not finite or huge."""
    return f"{value:,.{decimals}f}" if math.isfinite(value) and abs(value) < 1e6 else compact(value)


def share(value: float) -> str:
    """`56.1%`, as a line of a log has it."""
    return f"{value:.1%}" if math.isfinite(value) else NOT_FINITE


def duration(seconds: float) -> str:
    """For people: `8 s`, `3 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def axis_texts(values: Sequence[float], form: Form) -> list[str]:
    """The numbers of an axis, with as many digits as tell them apart."""
    for digits in range(3, 16):
        texts = [form(value, digits) for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def _exponential(value: float, digits: int) -> str:
    """`6e-05`, `1.2e-09`: one digit less than asked for, since the exponent takes room."""
    return f"{value:.{digits - 2}e}".replace(".0e", "e") if digits <= 3 else f"{value:.{digits - 1}e}"


def _plain(value: float, digits: int) -> str:
    """`g` without an exponent: 999.96 with three digits is 1,000 and not 1e+03."""
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text else text
