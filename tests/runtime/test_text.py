from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_bundle import WORDS, TowerRules, clip_tokenizer, plm_tokenizer
from xadapter_export.errors import ConfigError, InputTextError
from xadapter_export.runtime.text import (
    Int64Array,
    TextEncoder,
    TowerTokens,
    TruncationWarning,
    clip_text,
)

MASK = WORDS.index("[MASK]")


def make_encoder(max_seq: int = 16, context: int = 12, **changes: Any) -> TextEncoder:
    settings: dict[str, Any] = {
        "max_seq": max_seq,
        "mask_token": "[MASK]",
        "pad_token_id": 0,
        "has_token_type_ids": True,
    }
    clip = TowerTokens(clip_tokenizer(), TowerRules(context, 2))
    return TextEncoder(plm_tokenizer(), clip, **(settings | changes))


def words(ids: Int64Array) -> str:
    return " ".join(WORDS[i] for i in ids)


@pytest.mark.parametrize(
    ("text", "pair", "expected"),
    [
        ("The color of [MASK].", None, "The color of ."),
        ("  a \n[MASK]  b [MASK]", None, "a b"),
        ("[MASK]", None, ""),
        ("a [MASK]", " b\t", "a b"),
    ],
)
def test_clip_reads_the_sentence_without_its_mask(text: str, pair: str | None, expected: str) -> None:
    assert clip_text(text, "[MASK]", pair) == expected


def test_clip_text_without_a_mask_token_keeps_everything() -> None:
    assert clip_text("a <mask>", None) == "a <mask>"


def test_a_batch_is_padded_to_its_longest_row() -> None:
    arrays = make_encoder().encode(["the color of a lime is [MASK].", "[MASK] banana"])
    assert all(array.dtype == np.int64 for array in arrays.values())
    assert {name: array.shape for name, array in arrays.items()} == {
        "input_ids": (2, 10),
        "attention_mask": (2, 10),
        "token_type_ids": (2, 10),
        "clip_input_ids": (2, 9),
        "mask_positions": (2, 1),
    }
    assert words(arrays["input_ids"][1]) == "[CLS] [MASK] banana [SEP]" + " [PAD]" * 6
    assert arrays["attention_mask"].sum(1).tolist() == [10, 4]
    assert arrays["clip_input_ids"][1].tolist() == [1, 8, 2, 0, 0, 0, 0, 0, 0]
    assert arrays["mask_positions"].tolist() == [[7], [1]]


def test_a_pair_has_two_token_types_and_one_clip_sentence() -> None:
    arrays = make_encoder().encode("a banana", "a cherry")
    assert words(arrays["input_ids"][0]) == "[CLS] a banana [SEP] a cherry [SEP]"
    assert arrays["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert arrays["clip_input_ids"].tolist() == [[1, 7, 8, 7, 9, 2]]


def test_several_masks_and_rows_with_fewer() -> None:
    arrays = make_encoder().encode(["[MASK] and [MASK]", "a [MASK]", "a lime"])
    assert arrays["mask_positions"].tolist() == [[1, 3], [2, 2], [0, 0]]


def test_only_what_is_needed_is_made() -> None:
    encoder = TextEncoder(
        plm_tokenizer(), None, max_seq=8, mask_token=None, pad_token_id=0, has_token_type_ids=False
    )
    assert list(encoder.encode("a lime")) == ["input_ids", "attention_mask"]
    with pytest.raises(InputTextError, match="has no mask token"):
        encoder.encode("a lime", require_mask=True)


def test_the_tokenizers_own_limits_are_put_aside() -> None:
    tokenizer = plm_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    encoder = TextEncoder(
        tokenizer, None, max_seq=8, mask_token=None, pad_token_id=0, has_token_type_ids=False
    )
    assert encoder.encode("a banana is yellow")["input_ids"].shape == (1, 6)
    assert tokenizer.truncation is not None  # the caller's own is left alone


def test_a_long_text_keeps_its_beginning_and_warns() -> None:
    with pytest.warns(
        TruncationWarning, match=r"1 of 2 texts \(longest: 11 tokens\) were truncated to the 6 tokens"
    ):
        ids = make_encoder(6, 20).encode(["a [MASK] lime is green and very very very", "a [MASK]"])[
            "input_ids"
        ]
    assert words(ids[0]) == "[CLS] a [MASK] lime is [SEP]"


def test_the_window_slides_to_the_mask_and_keeps_both_sides() -> None:
    with pytest.warns(TruncationWarning, match="were truncated to the 7 tokens that the language model"):
        ids = make_encoder(7, 20).encode("the color of a lime is [MASK] and very very very")["input_ids"]
    assert words(ids[0]) == "[CLS] lime is [MASK] and very [SEP]"


def test_the_window_ends_with_the_text() -> None:
    with pytest.warns(TruncationWarning, match="were truncated to the 7"):
        ids = make_encoder(7, 20).encode("the color of a lime is [MASK]")["input_ids"]
    assert words(ids[0]) == "[CLS] of a lime is [MASK] [SEP]"


def test_masks_too_far_apart() -> None:
    with pytest.raises(InputTextError, match=r"too far apart.*'\[MASK\] very .*within 4 tokens, got 6"):
        make_encoder(6).encode("[MASK] very very very very [MASK]")


def test_the_longer_of_a_pair_gives_way_first() -> None:
    with pytest.warns(TruncationWarning, match="were truncated to the 9"):
        ids = make_encoder(9, 20).encode("a lime", "a cherry is red and very very very")["input_ids"]
    assert words(ids[0]) == "[CLS] a lime [SEP] a cherry is red [SEP]"


def test_a_long_clip_text_keeps_end_of_text() -> None:
    with pytest.warns(TruncationWarning, match="truncated to the 5 tokens that CLIP can read"):
        clip = make_encoder(16, 5).encode(["a very very very lime", "a"])["clip_input_ids"]
    assert clip.tolist() == [[1, 7, 13, 13, 2], [1, 7, 2, 0, 0]]


def clip_body(text: str, context: int, pair: str | None = None) -> list[int]:
    """Return what CLIP reads of a text that is too long for it, without start and end."""
    with pytest.warns(TruncationWarning, match="that CLIP can read"):
        (ids,) = make_encoder(64, context).encode(text, pair)["clip_input_ids"].tolist()
    assert (ids[0], ids[-1], len(ids)) == (1, 2, context)
    return [int(i) for i in ids[1:-1]]


def clip_ids(text: str) -> list[int]:
    return list(clip_tokenizer().encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("the color of a lime is very very", "the color of a"),  # no mask: the beginning
        ("the [MASK] color of a lime is", "the color of a"),  # the beginning holds it
        ("the color of a banana is [MASK] .", "a banana is ."),  # the end
        ("very very very lime is [MASK] and the color of", "lime is and the"),
        ("very very very lime [MASK] is [MASK] and the color of", "very lime is and"),
        ("lime very [MASK] very very very very very is [MASK] .", "lime very very very"),  # the first alone
        ("the very very very very lime [MASK] is very very very very [MASK]", "very lime is very"),
    ],
)
def test_clip_reads_where_the_mask_was(text: str, read: str) -> None:
    assert clip_body(text, 6) == clip_ids(read)


def test_clip_reads_where_the_mask_of_the_second_text_was() -> None:
    assert clip_body("very very very very", 6, "a lime is [MASK] .") == clip_ids("a lime is .")


filler = st.sampled_from(["the", "color", "of", "a", "banana", "cherry", "lime", "is", ".", "very", "and"])


@pytest.mark.filterwarnings("ignore::xadapter_export.runtime.text.TruncationWarning")
@given(st.lists(filler, max_size=30), st.lists(filler, max_size=30), st.integers(0, 3), st.integers(2, 24))
def test_clips_window_is_a_piece_of_the_text_with_both_neighbors_of_the_mask(
    left: list[str], right: list[str], num_masks: int, context: int
) -> None:
    if not left and not num_masks:
        left = ["a"]
    text = " ".join([*left, *["[MASK]"] * num_masks, *right])
    (row,) = make_encoder(128, context).encode(text)["clip_input_ids"].tolist()
    whole = clip_tokenizer().encode(clip_text(text, "[MASK]")).ids
    if len(whole) <= context:
        assert row == whole
        return
    size = context - 2
    assert (row[0], row[-1], len(row)) == (1, 2, context)
    body, words = row[1:-1], whole[1:-1]
    starts = [i for i in range(len(words) - size + 1) if words[i : i + size] == body]
    assert starts
    if num_masks == 0 or len(left) < size:
        assert body == words[:size]
    elif size > 1:
        assert any(i < len(left) and (not right or len(left) < i + size) for i in starts)
        middle = [i for i in starts if abs((len(left) - i) - (i + size - len(left))) <= 1]
        assert middle or body == words[-size:]


words_with_masks = st.lists(st.sampled_from(["very", "lime", "[MASK]"]), min_size=1, max_size=30)


@pytest.mark.filterwarnings("ignore::xadapter_export.runtime.text.TruncationWarning")
@given(words_with_masks, st.none() | words_with_masks, st.integers(5, 20))
def test_truncation_never_cuts_off_a_mask_silently(
    first: list[str], second: list[str] | None, max_seq: int
) -> None:
    encoder = make_encoder(max_seq, 77)
    pair = None if second is None else " ".join(second)
    spans = [
        len(part) - part.index("[MASK]") - part[::-1].index("[MASK]") if "[MASK]" in part else 0
        for part in (first, second or [])
    ]
    num_special = 2 if second is None else 3
    num_masks = first.count("[MASK]") + (second or []).count("[MASK]")
    total = len(first) + len(second or []) + num_special
    if total > max_seq and sum(spans) > max_seq - num_special:
        with pytest.raises(InputTextError, match="too far apart"):
            encoder.encode(" ".join(first), pair)
        return
    arrays = encoder.encode(" ".join(first), pair)
    ids = arrays["input_ids"][0]
    assert len(ids) == min(total, max_seq)
    assert (ids == MASK).sum() == num_masks
    assert ids[0] == WORDS.index("[CLS]")
    assert ids[-1] == WORDS.index("[SEP]")
    assert (ids == WORDS.index("[SEP]")).sum() == num_special - 1
    positions = arrays["mask_positions"][0]
    assert set(positions.tolist()) == (set(np.flatnonzero(ids == MASK).tolist()) or {0})


plain_words = st.lists(st.sampled_from(["very", "lime", "is"]), min_size=1, max_size=30).map(" ".join)


@pytest.mark.filterwarnings("ignore::xadapter_export.runtime.text.TruncationWarning")
@given(plain_words, st.none() | plain_words, st.integers(6, 20))
def test_without_masks_it_cuts_as_the_tokenizers_package_does(
    text: str, pair: str | None, max_seq: int
) -> None:
    tokenizer = plm_tokenizer()
    tokenizer.enable_truncation(max_seq)
    expected = tokenizer.encode(text, pair)
    arrays = make_encoder(max_seq, 77).encode(text, pair)
    assert arrays["input_ids"].tolist() == [expected.ids]
    assert arrays["token_type_ids"].tolist() == [expected.type_ids]


@pytest.mark.filterwarnings("ignore::xadapter_export.runtime.text.TruncationWarning")
@given(st.lists(st.text().filter(str.strip), min_size=1, max_size=4))
def test_any_text_gives_arrays_within_the_limits(texts: list[str]) -> None:
    try:
        arrays = make_encoder(8, 6).encode(texts)
    except InputTextError as error:
        assert "not valid Unicode" in str(error) or "too far apart" in str(error)  # noqa: PT017  # only some texts raise
        return
    assert arrays["input_ids"].shape[1] <= 8
    assert arrays["clip_input_ids"].shape[1] <= 6
    assert ((arrays["clip_input_ids"] == 2).sum(1) == 1).all()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no text was given"),
        ("", r"text 1 of 1 is empty; write a sentence"),
        (["a", " \n"], r"text 2 of 2 is empty"),
        (["a", None], r"text 2 of 2 is not a string \(got NoneType\)"),
        ("a \udce9", "text 1 of 1 is not valid Unicode"),
        ("a lime", r"no mask to fill: 'a lime'; write \[MASK\] where the word should go"),
        ("very " * 100, r"no mask to fill: 'very .*\.\.\.'"),
    ],
)
@pytest.mark.filterwarnings("ignore::xadapter_export.runtime.text.TruncationWarning")
def test_bad_texts(texts: str | list[str], message: str) -> None:
    with pytest.raises(InputTextError, match=message):
        make_encoder().encode(texts, require_mask=True)


def test_not_one_pair_to_each_text() -> None:
    with pytest.raises(
        InputTextError, match=r"the numbers of texts and second texts differ \(expected 2, got 1\)"
    ):
        make_encoder().encode(["a", "b"], ["c"])
    with pytest.raises(InputTextError, match="text pair 1 of 1 is empty"):
        make_encoder().encode("a", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token": "<mask>"}, "does not know the mask token: <mask>"),
        ({"max_seq": 2}, r"max_seq leaves no room \(expected more than 2, got 2\)"),
    ],
)
def test_rules_that_do_not_fit_the_tokenizers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_encoder(**changes)


@pytest.mark.parametrize("rules", [TowerRules(12, 7), TowerRules(1, 2)])
def test_facts_of_a_tower_that_do_not_fit_its_tokenizer(rules: TowerRules) -> None:
    with pytest.raises(ConfigError) as caught:
        TowerTokens(clip_tokenizer(), rules)
    assert caught.value.got == [1, 2]


def test_where_padding_matters_every_text_is_padded_to_the_context() -> None:
    tokens = TowerTokens(clip_tokenizer(), TowerRules(9, 2, pad_token_id=5, exact_at_true_length=False))
    with pytest.warns(TruncationWarning):
        short, long = tokens.encode(["a banana", "a banana is yellow and green and red"])
    assert short == [*clip_tokenizer().encode("a banana").ids, 5, 5, 5, 5, 5]
    assert (len(long), long[0], long[-1]) == (9, 1, 2)
