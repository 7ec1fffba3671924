"""VQA accuracy: answers in the official evaluation's normal form, each against ten people's."""

import re
from collections.abc import Sequence

from recipes.metric_rows import PerImageMean, check_pairs

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""

CONTRACTIONS = {
    form[:at] + form[at + 1 :]: form
    for form in _CONTRACTED.split()
    for at, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A contraction that lacks one of its apostrophes -> with it; and the official table's one slip."""

_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}

_ARTICLES = ("a", "an", "the")

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32


def normalise_answer(text: str) -> str:
    """The form in which answers are compared.

    Newlines and tabs become spaces; punctuation goes; the rest is lower-cased; number words up to
    ten become digits, articles go, contractions get their apostrophe back.

    The quirks of the official code are kept:

    - Apostrophes, colons, ``$``, ``%``, ``&``, ``*`` and ``#`` are no punctuation.
    - A mark becomes a space, as in "red/blue", unless anywhere in the text it stands beside a
      space: then it goes without one everywhere, "red/blue / green" is "redblue green".
    - A comma between two digits makes every mark go so: "1,000 t-shirts" is "1000 tshirts".
    - A period goes unless a digit follows: "1.5" and ".5" stay, "5." is "5", "e.g." is "eg". At
      most 32 go: the flag ``re.UNICODE`` is handed to the official ``sub`` as its count.
    - "none" is "0". Contractions that come of capitals ("Im", "Ive") are never found, as the text
      is lower-cased first; "somebody'd" loses its apostrophe.

    Source: Antol et al. (arXiv 1505.00468); ``vqaEval.py`` of GT-Vision-Lab/VQA,
    ``processPunctuation`` and ``processDigitArticle``.
    """
    plain = text.replace("\n", " ").replace("\t", " ").strip()
    joined = _COMMA_IN_NUMBER.search(plain) is not None
    unmarked = plain
    for mark in _MARKS:
        beside_space = f"{mark} " in plain or f" {mark}" in plain
        unmarked = unmarked.replace(mark, "" if joined or beside_space else " ")
    words = _PERIOD.sub("", unmarked, count=_PERIODS_REMOVED).lower().split()
    numbered = [_NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


class VqaAccuracy(PerImageMean):
    """VQA accuracy: an answer that three of the other people gave is right.

    Each of the people is left out in turn; against the rest an answer has min(matches / 3, 1); the
    accuracy is the mean over those left out, and then over the questions. With fewer than four
    answers to a question, all of the rest are needed in place of three, so that what everybody
    said has 1; a single answer is compared as it is.

    Both sides are always in normal form. The official code normalises the people's answers only
    where they differ, and its versions disagree whether more than punctuation is changed in them,
    and whether a prediction is normalised where they agree: on answers that are in normal form, as
    nearly all in VQAv2, the figures are those of the evaluation server, which takes them as given.

    Source: Antol et al. (arXiv 1505.00468) section 4.1; ``vqaEval.py`` of GT-Vision-Lab/VQA.
    """

    def update(self, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
        """Adds questions.

        Args:
            predictions: one answer to each.
            answers: what people said, ten of them in VQAv2.
        """
        check_pairs(predictions, answers)
        pairs = zip(predictions, answers, strict=True)
        self.append("scores", [_accuracy(text, said) for text, said in pairs])


def _accuracy(prediction: str, answers: Sequence[str]) -> float:
    written = normalise_answer(prediction)
    matches = [normalise_answer(answer) == written for answer in answers]
    if len(matches) == 1:
        return float(matches[0])
    needed = min(3, len(matches) - 1)
    found = sum(matches)
    return sum(min(1.0, (found - match) / needed) for match in matches) / len(matches)
