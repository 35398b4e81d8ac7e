"""Which language a reply is in, by its script or its commonest words; None unless it is clear."""

import re
from collections import Counter

from service.domain.comments.words import words

SAMPLE_CHARS = 600
MIN_HITS = 3

SCRIPTS = {
    "Japanese": re.compile(r"[\u3040-\u30ff]"),
    "Chinese": re.compile(r"[\u4e00-\u9fff]"),
    "Korean": re.compile(r"[\uac00-\ud7af]"),
    "Ukrainian": re.compile(r"[іїєґІЇЄҐ]"),
    "Russian": re.compile(r"[\u0400-\u04ff]"),
    "Greek": re.compile(r"[\u0370-\u03ff]"),
    "Hebrew": re.compile(r"[\u0590-\u05ff]"),
    "Arabic": re.compile(r"[\u0600-\u06ff]"),
    "Hindi": re.compile(r"[\u0900-\u097f]"),
    "Thai": re.compile(r"[\u0e00-\u0e7f]"),
}
"""Before a script's main language stand those that share it but have letters of their own."""
LATIN = re.compile(r"[A-Za-zÀ-ɏ]")

STOP_WORDS = {
    "English": words(
        "the and of to is it you that for with are was this have not be as on your but they from at an can i which will"
    ),
    "German": words(
        "der die das und ist nicht ein eine zu mit ich es auf für den dem von im auch sich wie sie wird sind kann aber oder"
    ),
    "French": words(
        "le la les et est une des du dans pour que qui ne pas sur avec vous il elle ce cette au aux sont par plus mais je nous"
    ),
    "Spanish": words(
        "el la los las y es una de que en por con para no se lo un al del como más pero su son está muy este esta puede"
    ),
    "Italian": words(
        "il lo la gli e è una di che in per con non si un al del della come più ma sono questo questa anche puoi nel"
    ),
    "Portuguese": words(
        "o a os as e é uma de que em por com para não se um ao do da como mais mas são isso esta está você no na"
    ),
}
_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> str | None:
    """The language's English name."""
    sample = text[:SAMPLE_CHARS]
    if not sample.isascii() and (name := _of_script(sample)):
        return name
    found = Counter(_WORD.findall(sample.casefold()))
    hits = sorted(((sum(found[w] for w in stop), name) for name, stop in STOP_WORDS.items()), reverse=True)
    (best, name), (second, _) = hits[0], hits[1]
    return name if best >= MIN_HITS and best >= 1.5 * second else None


def _of_script(sample: str) -> str | None:
    latin = len(LATIN.findall(sample))
    for name, letters in SCRIPTS.items():
        count = len(letters.findall(sample))
        # Kana stand between many Chinese characters, the Ukrainian letters between Russian ones.
        enough = max(latin // 10, MIN_HITS) if name in ("Japanese", "Ukrainian") else max(latin, MIN_HITS)
        if count >= enough:
            return name
    return None
