"""Full text in any language: which words a text is made of, and which texts fit a query best. Pure.

    wanted = query_words("Où est mon colis ?")
    order = ranked(wanted, ["Le colis est chez la voisine.", "Il préfère le thé."])     # [0]

The databases only find the texts that hold one of the words. What a word is, and which text comes first, is decided
here, so that it is the same on SQLite and on PostgreSQL, and for languages that their own word breakers don't know.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import chain, groupby, islice, pairwise

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_QUERY_WORDS = 64
_QUERY_CHARACTERS = 10_000
_WORD_CHARACTERS = 64
_DIACRITICS = range(0x300, 0x370)
_WITHOUT_SPACES = (  # scripts that are written without spaces between words
    range(0x0E00, 0x0F00),  # Thai, Lao
    range(0x1000, 0x10A0),  # Burmese
    range(0x1780, 0x1800),  # Khmer
    range(0x3040, 0x3100),  # Japanese kana
    range(0x3400, 0xA000),  # Chinese characters
    range(0xF900, 0xFB00),
    range(0x20000, 0x40000),
)
_KIN_CHARACTERS = 3
_KIN_ENDING = 3
_KIN_WEIGHT = 0.5
_SATURATION = 1.2  # BM25's k1: how soon the same word once more adds nothing
_LENGTH = 0.75  # BM25's b: how much a long text has to be better


def words(text: str) -> Iterator[str]:
    """The words of a text as they are searched for: letters, marks and digits, without case and accents.

    Of a script without spaces each character and each pair of neighbours is a word; a symbol such as an emoji is one
    of its own.
    """
    for run in _runs(text):
        if _is_dense(run[0]):
            yield from run
            yield from _pairs(run)
        else:
            yield run[:_WORD_CHARACTERS]


def query_words(text: str) -> list[str]:
    """The words to look for, each once: the first ones, if there are very many."""
    runs = _runs(text[:_QUERY_CHARACTERS])
    found = chain.from_iterable(_pairs(run) if _is_dense(run[0]) and run[1:] else words(run) for run in runs)
    return list(islice(dict.fromkeys(found), _QUERY_WORDS))


def shorter_kin(word: str) -> list[str]:
    """What `word` may be another form of: itself without its ending, which is shorter for a short word."""
    if not word.isalpha():
        return []
    stems = (word[:-cut] for cut in range(1, _KIN_ENDING + 1))
    return [stem for stem in stems if len(stem) >= _KIN_CHARACTERS and len(word) - len(stem) <= len(stem) // 2]


def has_longer_kin(word: str) -> bool:
    """Whether words that begin with `word` may be other forms of it."""
    return len(word) >= _KIN_CHARACTERS and word.isalpha()


def ranked(wanted: Collection[str], texts: Sequence[str]) -> list[int]:
    """The indexes of the texts that hold some of the words, the best first; of equals, the first.

    By BM25: a word that few of the texts hold counts more than one that most do. Another form of a word (longer or
    shorter by an ending) counts half.
    """
    counted = [_counted(wanted, text) for text in texts]
    holding = Counter(word for found, _ in counted for word in found)
    mean = sum(length for _, length in counted) / len(counted) if counted else 0.0

    def score(found: dict[str, float], length: int) -> float:
        damping = _SATURATION * (1 - _LENGTH + _LENGTH * length / mean) if mean else 0.0
        return sum(
            math.log(1 + (len(texts) - holding[word] + 0.5) / (holding[word] + 0.5)) * often / (often + damping)
            for word, often in found.items()
        )

    scores = {index: score(found, length) for index, (found, length) in enumerate(counted) if found}
    return sorted(scores, key=lambda index: -scores[index])


def _runs(text: str) -> Iterator[str]:
    """The stretches of a text within which words are: of one kind of script, without spaces; symbols one by one."""
    if text.isascii():  # ten times faster, and most texts are
        yield from _ASCII_WORD.findall(text.lower())
        return
    for kind, run in groupby(_plain(text), key=_kind):
        if kind == "symbols":
            yield from run
        elif kind:
            yield "".join(run)


def _plain(text: str) -> str:
    """Without what is only a matter of writing: case, accents, width."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    return unicodedata.normalize("NFC", "".join(one for one in folded if ord(one) not in _DIACRITICS))


@lru_cache(maxsize=4096)
def _kind(character: str) -> str | None:
    category = unicodedata.category(character)
    if category[0] in "LMN":
        return "dense" if _is_dense(character) else "spaced"
    return "symbols" if category == "So" else None


def _is_dense(character: str) -> bool:
    return any(ord(character) in script for script in _WITHOUT_SPACES)


def _pairs(run: str) -> Iterator[str]:
    return (first + second for first, second in pairwise(run))


def _counted(wanted: Collection[str], text: str) -> tuple[dict[str, float], int]:
    """How often a text holds each of the words, and how many words it has."""
    shorter = {kin: word for word in wanted for kin in shorter_kin(word)}
    counted = Counter(words(text))
    found: dict[str, float] = {}
    for word, often in counted.items():
        if word in wanted:
            found[word] = found.get(word, 0) + often
        elif len(word) >= _KIN_CHARACTERS:
            kin = next((one for one in shorter_kin(word) if one in wanted), None) or shorter.get(word)
            if kin is not None:
                found[kin] = found.get(kin, 0) + _KIN_WEIGHT * often
    return found, counted.total()
