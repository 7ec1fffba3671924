"""Words of captions, against what Stanford's tokenizer makes of them."""

import json
from pathlib import Path

import pytest

from recipes.metric_tokens import ptb_tokens

FIXTURE = json.loads(Path(__file__).with_name("data").joinpath("metric_tokens.json").read_text())


def test_words_are_those_of_the_jar():
    found = {text: " ".join(ptb_tokens(text)) for text, _ in FIXTURE["cases"]}
    assert found == dict(FIXTURE["cases"])


def test_the_fixture_holds_what_is_hard():
    """That a shorter table did not make the comparison easy."""
    texts = " ".join(text for text, _ in FIXTURE["cases"])
    assert len(FIXTURE["cases"]) > 250
    for hard in ("can't", "annot", "1/2", "U.S.", "’", "…", "&amp;", "'n'", "😀", "(", "@", "#"):
        assert hard in texts


def test_words_do_not_depend_on_earlier_calls():
    first = ptb_tokens("It's a dog.")
    first.append("changed")
    assert ptb_tokens("It's a dog.") == ["it", "'s", "a", "dog"]


@pytest.mark.parametrize(
    "text", ["a" * 20_000, "a." * 5_000, "<a " * 5_000, "'" * 5_000, "a@" * 999]
)
def test_long_texts_take_no_more_than_their_length(text: str):
    """Every letter is in some word, and none hangs (the patterns do not backtrack into each
    other)."""
    assert ptb_tokens(text) or not any(map(str.isalnum, text))
