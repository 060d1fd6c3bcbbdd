"""Rows of two tokenisations belong together exactly where the same bytes stand before them."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from two_tokenizers import ADVERSARIAL, digits_apart, digits_in_threes, sentencepiece

from trainer.align.rows import END, AlignedRows, Coverage, Span, align_rows, coverage, cut_chunks, read_spans
from trainer.align.token_bytes import TokenBytes
from trainer.align.vocabularies import match_ids
from trainer.errors import ConfigError

TOKENIZERS = {"apart": digits_apart, "threes": digits_in_threes, "sentencepiece": sentencepiece}
PAIRS = [(a, b) for a, b in product(TOKENIZERS, TOKENIZERS)]


OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}


def bytes_by_hand(tokenizer: PreTrainedTokenizerFast, index: int) -> bytes:
    """The oracle: by transformers' own table for byte-level vocabularies, by the letter for sentencepiece."""
    return all_bytes_by_hand(tokenizer)[index]


@cache
def all_bytes_by_hand(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    added = tokenizer.added_tokens_decoder
    return [_by_hand(tokenizer, index, added=index in added) for index in range(len(tokenizer))]


def _by_hand(tokenizer: PreTrainedTokenizerFast, index: int, *, added: bool) -> bytes:
    token = tokenizer.convert_ids_to_tokens(index)
    if added:
        return token.encode()
    if token.startswith("<0x") and len(token) == 6:
        return bytes.fromhex(token[3:5])
    if tokenizer.unk_token is not None:
        return token.replace("▁", " ").encode()
    return bytes(OF_CHARACTER[character] for character in token)


def answer(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a prompt of three tokens, the answer and its end."""
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    prompt = len(ids)
    ids = [*ids, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    mask = np.zeros(len(ids), dtype=bool)
    mask[prompt - 1 : -1] = True
    return np.array(ids, dtype=np.int32), mask


def spans(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[Span, ...]:
    return read_spans(*answer(tokenizer, text), token_bytes(tokenizer), ends={tokenizer.eos_token_id})


token_bytes = cache(TokenBytes.of)


def aligned_by_hand(first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast, text: str) -> set[tuple[int, int]]:
    """Every pair of rows of the answer is compared by all that stands before it."""
    prefixes = []
    for tokenizer in (first, second):
        ids, mask = answer(tokenizer, text)
        begin = int(np.flatnonzero(mask)[0])
        read = [ids[begin + 1 : row + 1].tolist() for row in np.flatnonzero(mask)]
        prefixes.append([b"".join(bytes_by_hand(tokenizer, i) for i in before) for before in read])
    return {(i, j) for i, a in enumerate(prefixes[0]) for j, b in enumerate(prefixes[1]) if a == b}


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("text", ADVERSARIAL)
def test_rows_are_those_that_a_comparison_of_every_pair_finds(first: str, second: str, text: str) -> None:
    one, two = TOKENIZERS[first](), TOKENIZERS[second]()
    found = align_rows(spans(one, text), spans(two, text))
    pairs = set(zip(found.student.tolist(), found.teacher.tolist(), strict=True))
    assert pairs == aligned_by_hand(one, two, text)
    last = (len(spans(one, text)[0].starts) - 1, len(spans(two, text)[0].starts) - 1)
    assert {(0, 0), last} <= pairs, "the first token and the end of the answer always belong together"


@pytest.mark.parametrize("text", ADVERSARIAL[:5])
def test_rows_moved_by_one_are_told_from_these(text: str) -> None:
    one, two = digits_apart(), digits_in_threes()
    found = align_rows(spans(one, text), spans(two, text))
    moved = set(zip(found.student.tolist(), (found.teacher + 1).tolist(), strict=True))
    assert not moved & aligned_by_hand(one, two, text)


@pytest.mark.parametrize("text", ADVERSARIAL)
def test_with_equal_tokenizers_every_row_has_its_own(text: str) -> None:
    for make in TOKENIZERS.values():
        one = spans(make(), text)
        found, num = align_rows(one, one), len(one[0].starts)
        assert found.student.tolist() == found.teacher.tolist() == list(range(num))
        chunks = cut_chunks(one, one)
        assert chunks.student.tolist() == chunks.teacher.tolist() == list(range(num))


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("text", ADVERSARIAL)
def test_chunks_of_both_sides_are_the_same_bytes_and_together_the_text(first: str, second: str, text: str) -> None:
    sides = [TOKENIZERS[first](), TOKENIZERS[second]()]
    found = cut_chunks(spans(sides[0], text), spans(sides[1], text))
    texts = []
    for tokenizer, numbers in zip(sides, (found.student, found.teacher), strict=True):
        ids, mask = answer(tokenizer, text)
        targets = ids[1:][mask[:-1]]
        pieces = [bytes_by_hand(tokenizer, int(i)) for i in targets[:-1]] + [END]
        texts.append([b"".join(p for p, n in zip(pieces, numbers, strict=True) if n == c) for c in range(found.count)])
    assert texts[0] == texts[1]
    assert b"".join(texts[0]) == text.encode() + END
    rows = aligned_by_hand(sides[0], sides[1], text)
    assert found.count == len(rows), "no chunk could be cut further"


def test_a_template_that_strips_white_space_leaves_the_rows_before_the_difference() -> None:
    one, two = digits_apart(), digits_in_threes()
    found = align_rows(spans(one, "the fox \n"), spans(two, "the fox"))
    assert len(found.student) >= 2
    assert found.student[-1] < len(spans(one, "the fox \n")[0].starts) - 1, "its end is another one"
    assert align_rows(spans(one, "the fox"), spans(two, "another")).student.tolist() == [0]
    assert cut_chunks(spans(one, "the fox"), spans(two, "another")).count == 0


def test_a_space_that_only_one_side_puts_before_the_answer_counts_for_nothing() -> None:
    one, two = digits_apart(), sentencepiece()
    found = align_rows(spans(one, "the fox"), spans(two, " the fox"))
    plain = align_rows(spans(one, "the fox"), spans(two, "the fox"))
    assert 0 < len(found.student) <= len(plain.student)
    assert found.student[-1] == plain.student[-1]


def test_answers_of_a_conversation_are_aligned_one_by_one() -> None:
    one, two = digits_apart(), digits_in_threes()
    texts = ("the quick fox 12", "a still 345")
    pairs = [(spans(one, text), spans(two, text)) for text in texts]
    both = align_rows(sum((a for a, _ in pairs), ()), sum((b for _, b in pairs), ()))
    parts = [align_rows(a, b) for a, b in pairs]
    shift, shift_other = (len(side[0].starts) for side in pairs[0])
    assert both.student.tolist() == [*parts[0].student, *(parts[1].student + shift)]
    assert both.teacher.tolist() == [*parts[0].teacher, *(parts[1].teacher + shift_other)]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        align_rows(pairs[0][0] + pairs[1][0], pairs[0][1])


def test_coverage_counts_bytes_and_digits_under_reached_rows() -> None:
    (span,) = spans(digits_apart(), "ab 12")
    assert span.data == b"ab 12" + END
    everything = np.ones(len(span.starts), dtype=bool)
    assert coverage((span,), everything) == Coverage(5, 5, 2, 2)
    first = np.zeros(len(span.starts), dtype=bool)
    first[list(span.starts).index(3)] = True  # the token "1"
    assert coverage((span,), first) == Coverage(5, 1, 2, 1)
    assert coverage((span,), first).plus(Coverage(5, 4, 0, 0)).byte_ratio == 0.5
    assert Coverage().byte_ratio == 1.0
    assert Coverage(5, 5, 0, 0).digit_ratio is None


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_ids_are_matched_by_their_bytes_each_once(first: str, second: str) -> None:
    one, two = TOKENIZERS[first](), TOKENIZERS[second]()
    table = match_ids(token_bytes(one), token_bytes(two), roles={one.eos_token_id: two.eos_token_id})
    matched = np.flatnonzero(table >= 0)
    assert len(set(table[matched].tolist())) == len(matched)
    for index in set(matched.tolist()) - {one.eos_token_id}:
        assert bytes_by_hand(one, index) == bytes_by_hand(two, int(table[index]))
    assert table[one.eos_token_id] == two.eos_token_id
    known = {bytes_by_hand(two, i) for i in range(len(two)) if i not in two.added_tokens_decoder}
    missed = set(range(len(one))) - set(matched.tolist()) - one.added_tokens_decoder.keys()
    assert not [i for i in missed if bytes_by_hand(one, i) in known - _twice(one)]
    if first == second:
        assert (table == np.arange(len(one))).sum() >= len(one) - 1  # <unk> stands for nothing


def _twice(tokenizer: PreTrainedTokenizerFast) -> set[bytes]:
    """Bytes of several ids: a character and its byte."""
    found = [bytes_by_hand(tokenizer, i) for i in range(len(tokenizer))]
    return {value for value in found if found.count(value) > 1}


def test_an_end_of_answer_keeps_its_role_whatever_else_has_its_name() -> None:
    one, two = tiny_tokenizer(), digits_apart()
    start = one.convert_tokens_to_ids("<|im_start|>")
    table = match_ids(token_bytes(one), token_bytes(two), roles={start: two.eos_token_id})
    assert table[start] == two.eos_token_id
    assert table[one.eos_token_id] == -1, "of the same name, but its like is taken"


def test_tokenizers_whose_tokens_are_no_bytes_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match=r"student.model is of type WordLevel .* choose another model"):
        TokenBytes.of(PreTrainedTokenizerFast(tokenizer_object=words), name="student.model")
    from tokenizers import normalizers

    lower = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()))
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match=r"changes the text that it reads \('The quick.* becomes b'the quick"):
        TokenBytes.of(lower)


def test_aligned_rows_are_kept_in_order() -> None:
    found = align_rows(spans(digits_apart(), "the 12 fox 345"), spans(sentencepiece(), "the 12 fox 345"))
    assert isinstance(found, AlignedRows)
    assert (np.diff(found.student) > 0).all()
    assert (np.diff(found.teacher) > 0).all()
