"""Words of a caption as COCO's scorer counts them: Stanford's PTBTokenizer without Java."""

import re
import unicodedata
from functools import lru_cache

PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())  # noqa: SIM905
"""What the scorer leaves out. Its list has -LRB- and -LCB-, for brackets, as well, but they never
match: the tokens are lower-cased by then, and brackets stay."""

_ALONE = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": "''",
}

_QUOTES = str.maketrans(
    {
        '"': "''",
        "‘": "`",
        "’": "'",
        "“": "``",
        "”": "''",
        "‹": "`",
        "›": "'",
        "«": "``",
        "»": "''",
    }
)

_SIGNS = {
    "¢": " cents ",
    "£": "#",
    "¤": "$",
    "€": "$",
    "¼": " 1/4 ",
    "½": " 1/2 ",
    "¾": " 3/4 ",
    "⅓": " 1/3 ",
    "⅔": " 2/3 ",
    "\N{FIGURE DASH}": " ",
    "\N{EN DASH}": " -- ",
    "\N{EM DASH}": " -- ",
    "\N{HORIZONTAL BAR}": " -- ",
    "…": " ... ",
}
"""What the tokenizer writes in another way."""

# Always abbreviations, in capitals or not.
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros
calif capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq
est etc ext feb fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky
lieut lt ltd maj mar md messrs mich minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct
okla penn pfc ph plc pres prof profs pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr
st ste supt supts sys tel tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo
"""
# Words of their own unless they begin with a capital.
_CAPITALISED = "ark az del ill la mass miss ore pa tex wash"
# Abbreviations unless they are all capitals.
_NOT_CAPITALS = "mfg mtg ppte pptes ppty pptys pte ptes pty ptys"
# Abbreviations before a number.
_NUMBERED = "art bldg ca fig figs no nos op pp prop"
# What begins a sentence, so that the single letter before it ended one.
_STARTERS = """
A About According Additionally After An As At But Earlier He Her Here However If In It Last Many
More Now Once One Other Our She Since So Some Such That The Their Then There These They This We
What When While Yet You
"""

_SPLIT = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "lemme": "lem me",
    "gimme": "gim me",
    "wanna": "wan na",
}


def _any_of(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


_MARKS = "".join(
    letter for letter in map(chr, range(0x300, 0xFE00)) if unicodedata.category(letter)[0] == "M"
)
_A = rf"(?:[^\W_]|[{_MARKS}])"  # a letter or a digit
_L = rf"(?:[^\W\d_]|[{_MARKS}])"  # a letter
_Q = "['’]"
_H = "[-\N{HYPHEN}\N{NON-BREAKING HYPHEN}]"
_CLITIC = "(?i:'(?:s|m|d|ll|re|ve)(?![a-z])|’(?:s|m|d|ll|re|ve))"
_PART = rf"(?:[dDoOlL]{_Q}{_L})?{_A}+(?:_+{_A}+)*"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+\.|(?i:ed|ph)\.[dD]\."
_ABBREVIATION = (
    rf"(?i:{_any_of(_ABBREVIATIONS)})\."
    rf"|(?:{'|'.join(f'[{w[0].upper()}](?i:{w[1:]})' for w in _CAPITALISED.split())})\."
    rf"|(?:{'|'.join(f'(?i:{w[0]}){w[1:]}' for w in _NOT_CAPITALS.split())})\."
    rf"|(?i:{_any_of(_NUMBERED)})\.(?=[ ]?\d)"
)
_NUMBER = r"\d*(?:[.:,]\d+)+|\d+"
_STARTER = rf"(?:M[rs]\.|(?:{'|'.join(f'{w[0]}(?i:{w[1:]})' for w in _STARTERS.split())})(?:\s|$))"

# Of those that match, the longest wins. A group is the word, where what follows it decides.
_LEXER = tuple(
    re.compile(pattern)
    for pattern in (
        r"</?[A-Za-z!?][^<>]*>",
        r'https?://[^\s"<>|()]*[^\s"<>|.!?(){},-]',
        r'[A-Za-z0-9][^\s"<>|()@]*@[\w-]+(?:\.[\w-]+)*',
        rf"@[A-Za-z_]\w*|\#{_L}+",
        # Clitics, and the word before "n't".
        rf"({_L}*[^\W\d_])[nN]['’‘`][tT]",
        r"[nN]['’‘`][tT](?![A-Za-z])",
        rf"({_L}+){_CLITIC}",
        _CLITIC,
        r"('[tT])(?i:is|was)",
        # Words with apostrophes.
        rf"{_Q}[nN](?:{_Q}|(?=\s|$))|{_Q}(?i:em|till?|cause)|{_Q}(?:[2-9]0s|\d\d(?=\s|$))",
        rf"([yY]{_Q}){_L}+",
        rf"[lLdDjJ]{_Q}",
        rf"[A-HJ-XZn]{_Q}{_L}{{2}}{_L}*|{_L}+[aeiouyAEIOUY]{_Q}[aeiouA-Z]{_L}*",
        r"(?i:ol['’]|somethin['’]|dunkin['’]|li'l|e'er|c'mon|s'mores)",
        # Words with periods, hyphens, slashes in them.
        rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*",
        rf"{_PART}(?:{_H}{_PART})*",
        r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
        r"[A-Z]+(?:[+&][A-Z]+)+|[Cc]\+\+|[CcFf]\#|[A-Z]{1,2}\$|&(?:amp|lt|gt|quot);",
        rf"(?:[A-Za-z0-9]+{_H})*(?:{_ACRONYM})|{_ABBREVIATION}",
        r"(?:[A-Za-z0-9]+\.)+[A-Za-z0-9]*(?:-[A-Za-z0-9]+)+",
        rf"[A-Za-z]\.(?!\s+{_STARTER})",
        rf"{_A}+(?:[-.!?]{_A}+)*\.(?=[,;:])",
        # Numbers.
        rf"[-+]?(?:{_NUMBER})",
        rf"\d*(?:[.,]\d+)+(?:{_H}{_A}+)+",
        r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}",
        # Signs that belong together.
        rf"[<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]](?!{_A})|\^_\^|-_-|>_<",
        r"[?!]+|\.+|-+|_+|\*+|\#+|@+|''|``|[‘’“”‹›«»`]{2}|[‘’“”‹›«»]",
    )
)
_CLITIC_NEXT = re.compile(_CLITIC + r"|(?i:n['’‘]t)")
_PLAIN = re.compile(r"[a-zA-Z]+(?=[ ,]|$)")


def ptb_tokens(text: str) -> list[str]:
    """The words of a caption, lower-cased, clitics apart ("does", "n't"), punctuation left out.

    They are those of pycocoevalcap's ``PTBTokenizer``, the tokenizer of Stanford's CoreNLP 3.4.1,
    for all but exotic texts; its oddities are kept, such as ``"'empty'"`` -> "'em", "pty" and the
    period that stays in "a dog.; a cat". Where it differs:

    - Each text stands alone. The official scorer has all captions in one file, and there the
      first word of the next one can change the last of this one ("vitamin C.").
    - A word that CoreNLP writes with a no-break space in it ("3 1/2") is two words.
    - Telephone numbers with brackets, addresses without a protocol, odd e-mail addresses, and
      symbols and scripts that are younger than Java's tables of 2014.

    Source: what CoreNLP's program makes of texts, tried on all words of up to four letters, all
    characters of Unicode's first plane, and some ten thousand made-up lines.
    """
    return list(_tokens(text))


@lru_cache(maxsize=2**15)
def _tokens(text: str) -> tuple[str, ...]:
    text = text if text.isascii() else _readable(text)
    words: list[str] = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        end = _end(text, at)
        words += _written(text[at:end], text, end)
        at = end
    return tuple(word for word in words if word not in PUNCTUATION)


def _end(text: str, at: int) -> int:
    """Where the word ends that begins at a place."""
    if plain := _PLAIN.match(text, at):
        return plain.end()
    matches = [match for pattern in _LEXER if (match := pattern.match(text, at))]
    longest = max(matches, key=re.Match.end, default=None)
    if longest is None or longest.end() == at:
        return at + 1
    return longest.end(longest.lastindex or 0)


def _written(word: str, text: str, end: int) -> list[str]:
    """How a word is written, which ends at a place of the text; a few are two."""
    word = word.lower()
    if word in _SPLIT and not _CLITIC_NEXT.match(text, end):
        return _SPLIT[word].split()
    if word in _ALONE:
        return [_ALONE[word]]
    if word[0] in "-." and len(set(word)) == 1:
        return [word] if len(word) > 4 and word[0] == "-" else [word[0]]
    if not any(map(str.isalnum, word)) or _CLITIC_NEXT.fullmatch(word):
        word = word.translate(_QUOTES)
    if not word.endswith(">"):
        word = word.replace("(", "-lrb-").replace(")", "-rrb-")
    return word.split()


def _readable(text: str) -> str:
    """Text in which signs are written out, and those that the tokenizer does not know left out."""
    return "".join(_SIGNS.get(letter) or _known(letter) for letter in text)


def _known(letter: str) -> str:
    kind = unicodedata.category(letter)
    if letter == "\N{SOFT HYPHEN}":
        return ""
    if kind == "No":
        return f" {letter} "
    is_known = letter < "\U00010000" and not "\N{VARIATION SELECTOR-1}" <= letter <= "\ufe0f"
    return letter if is_known and kind not in ("Cf", "Cn", "Co", "Cc", "Nl", "Me", "Zs") else " "
