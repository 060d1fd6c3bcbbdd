"""What makes products and top-k fast on one kind of processor, chosen when a process starts.

    plain.py      each function as its formula, on every device
    cpu.py        the same functions for tensors in host memory; tensors elsewhere go to plain.py
    linear.py     the linear layers of a student's body through those products
    libraries.py  which library multiplies, measured at start

Both give equal results up to the rounding of float32 sums in another order. STILLHOUSE_FAST=0 in the environment
chooses plain.py everywhere, to tell a fault of the fast code from one of the mathematics; onednn or blas names the
library that multiplies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import ModuleType

from trainer.build import FAST
from trainer.errors import ConfigError
from trainer.model.fast import cpu, plain
from trainer.model.fast.product import BLAS, ONEDNN


def choose(environment: Mapping[str, str]) -> ModuleType:
    """The module whose functions a process with this environment uses. Raises `ConfigError` for an unknown value."""
    modules = {"1": cpu, "0": plain, ONEDNN: cpu, BLAS: cpu}
    value = environment.get(FAST, "1")
    if value not in modules:
        raise ConfigError(f"the environment variable {FAST} is {value!r}: write 1 (the default), 0, {ONEDNN} or {BLAS}")
    return modules[value]


chosen = choose(os.environ)
add_matmul_nt = chosen.add_matmul_nt
cache_blocks = chosen.cache_blocks
log_sum_exp = chosen.log_sum_exp
log_sum_exp_without = chosen.log_sum_exp_without
known_to_be_one = chosen.known_to_be_one
matmul_nt = chosen.matmul_nt
row_dots = chosen.row_dots
softmax_and_log_sum_exp = chosen.softmax_and_log_sum_exp
top_k = chosen.top_k
use_fast_products = chosen.use_fast_products
whole_rows = chosen.whole_rows
