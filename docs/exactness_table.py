"""docs/exactness.md, made from the registries and docs/exactness.json: `python docs/exactness_table.py >
docs/exactness.md`."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from configs.labels import LABELS, Labels
from configs.losses import LOSSES, Term

DATA = Path(__file__).with_name("exactness.json")
HEAD = """# How exact a loss is

Made from `configs/losses.py`, `configs/labels.py` and `docs/exactness.json` by `python docs/exactness_table.py`. A row
is a divergence, a column the `labels` that it is computed from. What a cell claims is the registry's, as in
[objectives.md](objectives.md), and holds for every pair of models; `check` refuses what is refused, and the first lines
of a run and its report name what is a bound or biased.

Beside it stands what was **measured**: bias of the mean value / distance of the gradient by the student's logits, both
in percent of the exact ones, over the whole vocabulary in float64. A sign says whether the value comes out larger or
smaller. Of labels that are drawn the mean of {draws} draws is measured, ± its standard error, and in brackets how far
one draw of the gradient is from the mean. What is exact differs by the rounding of float32; `topk` and its like also
round their log-probabilities to float16.

"""
DRAWS = 64


def exactness_table() -> str:
    """The page."""
    found = json.loads(DATA.read_text())
    labels = [one for one in LABELS.built_in if "labels" in one.gives]
    kinds = [LABELS.kind_of(one) for one in labels]
    terms = [one for one in LOSSES.built_in if "labels" in one.needs and one.form == "row"]
    terms = [one for one in terms if not one.across_tokenizers and "rollouts" not in one.needs]
    lines = [HEAD.format(draws=DRAWS) + f"| loss | {' | '.join(f'`{kind}`' for kind in kinds)} |"]
    lines.append("|---" * (1 + len(kinds)) + "|")
    lines += [
        f"| `{LOSSES.kind_of(term)}` | {' | '.join(_cell(term, one, found) for one in labels)} |" for term in terms
    ]
    on = date.fromisoformat(found["date"])
    lines += [
        "",
        f"Measured on {on.day} {on:%B %Y} with `python -m benchmarks exactness` on a processor ({found['processor']}): "
        f"{found['rows']} rows of {found['texts']} held-out answers of the demo (`configs/data/demo_eval.jsonl`), "
        f"teacher `{found['teacher']}`, student `{found['student']}` before any training; {_parameters(found)}. The "
        "nearer a student comes to its teacher, the smaller the exact value is that these are shares of.",
    ]
    return "\n".join(lines) + "\n"


def _cell(term: type[Term], labels: type[Labels], found: dict[str, Any]) -> str:
    kind, loss = LABELS.kind_of(labels), LOSSES.kind_of(term)
    claim = term.exactness_with(labels)
    if claim in ("refused", None):
        return "refused"
    cell = found["cells"][kind][loss]  # KeyError: not measured yet
    words = claim.replace("_", " ")
    value, gradient = 100 * cell["value_bias"], 100 * cell["gradient_bias"]
    if "gradient_error" not in cell:
        return f"{words}<br>{_percent(value, sign=True)} / {_percent(gradient)}"
    value_error, gradient_error = 100 * cell["value_error"], 100 * cell["gradient_error"]
    return (
        f"{words}<br>{_percent(value, sign=True)} ± {_percent(value_error)} / {_percent(gradient)} ± "
        f"{_percent(gradient_error)} ({_percent(100 * cell['gradient_spread'])})"
    )


def _percent(number: float, *, sign: bool = False) -> str:
    """Two digits; what is below 0.005 is rounding and told as nothing."""
    size = abs(number)
    if size < 0.005:
        return "0"
    digits = 0 if size >= 9.95 else 1 if size >= 0.995 else 2
    return f"{number:+.{digits}f}" if sign else f"{number:.{digits}f}"


def _parameters(found: dict[str, Any]) -> str:
    """Those of the labels and terms that were measured, where they have some."""
    own = {
        name: {key: value for key, value in parameters.items() if key not in ("kind", "temperature", "dtype")}
        for name, parameters in {**found["labels"], **found["terms"]}.items()
    }
    return "; ".join(f"{name} {_plain(values)}" for name, values in own.items() if values)


def _plain(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()
    )


if __name__ == "__main__":
    print(exactness_table(), end="")
