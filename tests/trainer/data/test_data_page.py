"""docs/data.md: every row on the page is read, as what the page says, with what it says in the loss."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from given_rows import rows_of
from ruamel.yaml import YAML

from configs.prompts import RowFormat
from trainer.data.row import ChatRow, CorpusRow, PreferenceRow, Row, TextRow
from trainer.data.rows import FORMATS

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
BLOCK = re.compile(r"```(json|yaml)\n(.*?)```", re.DOTALL)
LEARNT = {
    "messages": ["The still."],
    "sharegpt": ["The still."],
    "alpaca": ["It drips."],
    "dolly": ["It drips."],
    "query_response": ["It drips.", "It rests."],
    "question_answer": ["The still."],
    "prompt_completion": ["The still."],
    "preference": ["The still.", "Nothing."],
    "candidates": ["The still.", "The mill.", "Nothing."],
    "text": ["The still drips all night, and rests by day."],
}


def named_blocks() -> list[tuple[list[str], list[dict]]]:
    """The formats that a paragraph names in bold, and the rows of the block behind it."""
    found = []
    for paragraph in re.split(r"\n(?=\*\*`|###? )", PAGE):
        names = re.findall(r"\*\*`(\w+)`\*\*", paragraph)
        if names and (block := BLOCK.search(paragraph)):
            found.append((names, [json.loads(line) for line in block[2].splitlines()]))
    return found


def learnt(row: Row) -> list[str]:
    match row:
        case ChatRow():
            answers = range(row.loss_from, len(row.messages))
            return [
                row.messages[index]["content"]
                for index in answers
                if row.messages[index]["role"] == "assistant" and row.turn_weights.get(index) != 0
            ]
        case TextRow():
            return [(row.completion or "").strip()]
        case CorpusRow():
            return [row.text]
    return [text for answer in row.answers for text in learnt(answer)]


@pytest.mark.parametrize(("names", "rows"), named_blocks(), ids=lambda value: "-".join(map(str, value))[:20])
def test_every_row_is_read_as_the_format_that_it_stands_under(names: list, rows: list, tmp_path: Path) -> None:
    formats = set()
    for row in rows:
        read = rows_of(tmp_path, row)
        formats.add(read.format)
        assert learnt(read.read(0, needs_answer=True)) == LEARNT[read.format]
    assert formats == set(names)


def test_every_format_has_its_place_on_the_page() -> None:
    assert {name for names, _ in named_blocks() for name in names} | {"prompt"} == set(FORMATS)
    assert set(FORMATS) == set(RowFormat.__args__)
    assert "**`prompt`**" in PAGE


def test_every_mapping_reads_the_row_behind_it(tmp_path: Path) -> None:
    pairs = re.findall(r"```yaml\n([^`]*columns:[^`]*)```\n\n```json\n([^`]*)```", PAGE)
    assert len(pairs) == 2
    read = []
    for text, line in pairs:
        prompts = YAML(typ="safe").load(text)["prompts"]
        read.append(rows_of(tmp_path, json.loads(line), columns=prompts["columns"]).read(0, needs_answer=True))
    talk = ({"role": "user", "content": "What drips?"}, {"role": "assistant", "content": "The still."})
    assert read[0] == ChatRow(talk, 0)
    assert isinstance(read[1], PreferenceRow)
    assert read[1].chosen == ChatRow(talk, 1)


def test_tools_and_weights_are_read_as_the_page_says(tmp_path: Path) -> None:
    tools, weights = (
        re.search(rf"### {name}\n.*?```json\n(.*?)```", PAGE, re.DOTALL)[1] for name in ("Tools", "Weights")
    )
    openai, shared = (rows_of(tmp_path, json.loads(line)).read(0, needs_answer=True) for line in tools.splitlines())
    bare = [{k: v for k, v in one.items() if k != "tool_call_id"} for one in openai.messages]
    del bare[1]["tool_calls"][0]["id"]
    assert (bare, openai.tools) == (list(shared.messages), shared.tools)
    assert learnt(shared) == ["", "It is hot."]
    weighted = rows_of(tmp_path, json.loads(weights)).read(0, needs_answer=True)
    assert (weighted.turn_weights, weighted.weight, learnt(weighted)) == ({1: 0.0}, 0.3, ["The still."])


def test_every_role_of_the_page_is_known_and_no_other_one(tmp_path: Path) -> None:
    from trainer.data.formats.turns import _BY_NAME

    table = PAGE.split("### Roles")[1].split("###")[0]
    named = {
        word
        for line in table.splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert named <= set(_BY_NAME)
    assert set(_BY_NAME) - named == {"observations", "function_response"}
