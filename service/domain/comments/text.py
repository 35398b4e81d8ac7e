"""Comments as plain text: markup and what cannot be seen taken away, words and quotations found.

Every pattern is linear in its input: bounded or possessive quantifiers, each run entered at its start only.
"""

import re

READ_CHARS = 1200
"""No more of a comment is read: a guideline has 300 at most, and the time of a feedback request must not grow with its comment."""

_PUNCTUATION = (
    r"!-/:-@\[-`{-~"  # ASCII
    r"\u00a1-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u2010-\u205e"  # Latin and general
    r"\u3001-\u3004\u3008-\u3020\u3030\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # CJK
    r"\u060c\u061b\u061f\u066a-\u066d\u06d4\u0964\u0965"  # Arabic, Devanagari
)
_SYMBOLS = r"\u2190-\u2bff\U0001f000-\U0001faff"  # arrows, dingbats, emoji: each a word of its own
WORD = re.compile(rf"[^\s{_PUNCTUATION}{_SYMBOLS}]+(?:['’][^\s{_PUNCTUATION}{_SYMBOLS}]+)*|[{_SYMBOLS}]")
"""A word of any script; a script without spaces gives one for each run between punctuation."""

QUOTED = (
    r'"[^"\n]{1,120}"|“[^”\n]{1,120}”|„[^“”\n]{1,120}[“”]|«[^»\n]{1,120}»|「[^」\n]{1,120}」'
    r"|(?<!\w)'[^'\n]{1,120}'(?!\w)|(?<!\w)‘[^‘’\n]{1,120}’(?!\w)"
)
"""Source of a pattern for a quotation, which is never cut or read as an instruction."""

# Zero-width and bidi characters, variation selectors, tags; lone surrogates can't be encoded.
_INVISIBLE = re.compile(
    r"[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ud800-\udfff"
    r"\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_LINE_BREAK = re.compile(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x9f]")
_ENTITIES = {"nbsp": " ", "lt": "<", "gt": ">", "quot": '"', "apos": "'", "#39": "'", "#x27": "'"}
# However often it was escaped.
_ENTITY = re.compile(r"&(?:amp;)*+(nbsp|lt|gt|quot|apos|#39|#x27);|&(?:amp;)++")
_CONTROL_TOKEN = re.compile(r"<[|｜][^<>|｜\n]{0,100}[|｜]>")
_LINK = re.compile(r"!?\[([^\[\]\n]{0,200})\]\([^()\s]{0,500}\)")
_TAG = re.compile(r"(?<!<)<[/!]?[A-Za-z][^<>]{0,300}>(?!>)|<!--[^<>]{0,300}-->")
_BLOCK_TAG = re.compile(r"</?(?:p|br|div|li|ul|ol|tr|table|pre|hr|blockquote|h[1-6])\b", re.I)
# What is left of a tag inside a tag; "<<title>>" and "<3" stay.
_TAG_START = re.compile(r"(?<!<)<(?=[A-Za-z/!|｜])")
_FENCE = re.compile(r"^[^\S\n]*+(?:`{3,}+|~{3,}+)[\w+#.-]{0,20}[^\S\n]*+$", re.M)
_LINE_MARKER = re.compile(r"^(?:[^\S\n]*+(?:>|(?:[-*+•‣◦▪●○·–—✓✔➤►]|\d{1,3}[.)]|#{1,6})(?=\s|$)))++", re.M)
_EMPHASIS = re.compile(r"([`*_~])\1*+")
_BLANKS = re.compile(r"[^\S\n]+")


def plain(comment: str) -> str:
    """The first `READ_CHARS` of a comment, line by line, as the reader of its rendered markup would see it."""
    text = _INVISIBLE.sub("", cut_at_word(comment, READ_CHARS))
    text = _CONTROL.sub(" ", _LINE_BREAK.sub("\n", text))
    text = _ENTITY.sub(lambda m: _ENTITIES[m[1]] if m[1] else "&", text)
    text = _LINK.sub(r"\1", _CONTROL_TOKEN.sub(" ", text))
    text = _TAG_START.sub(" ", _TAG.sub(_shown_of_tag, text))
    text = _LINE_MARKER.sub("", _FENCE.sub("", text))
    return _BLANKS.sub(" ", _EMPHASIS.sub(_shown_of_emphasis, text))


def cut_at_word(text: str, chars: int) -> str:
    """At most `chars` of a text, without a part of a word where a blank is near."""
    if len(text) <= chars:
        return text
    space = text.rfind(" ", max(0, chars - 60), chars + 1)
    return text[:space] if space > 0 else text[:chars]


def _shown_of_tag(match: re.Match[str]) -> str:
    """A line break for a block, nothing for other tags; "a <b and c> d" holds none."""
    tag = match[0]
    if " " in tag and "=" not in tag and not tag.startswith(("<!", "</")) and not tag.endswith("/>"):
        return tag
    return "\n" if _BLOCK_TAG.match(tag) else ""


def _shown_of_emphasis(match: re.Match[str]) -> str:
    """Nothing for backticks, for runs of a mark and for one mark around words; "snake_case", "2 * 3" and "~5" hold none."""
    mark, (start, end), text = match[1], match.span(), match.string
    before, after = text[start - 1 : start].isalnum(), text[end : end + 1].isalnum()
    if mark == "`" or (end - start > 1 and mark != "_"):
        return ""
    opens_or_closes = before != after or (mark == "*" and not text[start - 1 : start].isspace() and not after)
    return "" if opens_or_closes and mark != "~" else match[0]
