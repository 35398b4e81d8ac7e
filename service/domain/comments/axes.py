"""The axes of style that stances speak of, and the words for them.

A *noun* is asked for or refused ("use bullets", "no bullets"); a *manner* stands alone ("short", "be formal"). Most are English; of German,
French, Spanish, Italian and Portuguese the commonest. A missing word costs a contradiction that is not seen; a wrong one retires a good
guideline, so what is ambiguous is left out.
"""

from typing import NamedTuple

from service.domain.comments.words import phrases, words


class Concept(NamedTuple):
    """What asking for a thing means on its axis, and what refusing it means; None says nothing."""

    axis: str
    value: str | None
    opposite: str | None
    is_noun: bool = False


NOUNS = {
    (
        "bullets",
        "yes",
        "no",
    ): """bullets, bullet points, bullet point, bullet lists, bullet list, bulleted list, bulleted lists,
        stichpunkte, stichpunkten, aufzählungen, aufzählungszeichen, puces, viñetas, elenchi puntati""",
    ("bullets", "numbered", "not numbered"): "numbered list, numbered lists, numbered steps",
    ("bullets", None, "no"): "lists, a list, list form, listen, listes, listas, elenchi",
    ("bullets", "no", None): "prose, flowing text, full paragraphs, fließtext",
    ("commas", "yes", "no"): "comma, commas, kommas, virgules, comas",
    (
        "exclamation",
        "yes",
        "no",
    ): """exclamation mark, exclamation marks, exclamation point, exclamation points, exclamations,
        ausrufezeichen, points exclamation""",
    ("emoji", "yes", "no"): "emoji, emojis, emoticon, emoticons, smiley, smileys, emoticones",
    (
        "examples",
        "yes",
        "no",
    ): """example, examples, beispiel, beispiele, beispielen, exemple, exemples, ejemplo, ejemplos, esempi,
        exemplos""",
    (
        "code",
        "yes",
        "no",
    ): """code, code block, code blocks, code example, code examples, code snippet, code snippets, code sample,
        code samples""",
    ("formatting", "yes", "no"): "markdown, formatting, formatierung",
    ("formatting", "no", None): "plain text",
    ("headings", "yes", "no"): "heading, headings, headers, headlines, subheadings, überschriften",
    ("bold", "yes", "no"): "bold, bold text, boldface, bold words",
    ("tables", "yes", "no"): "tables, a table",
    ("title", "yes", "no"): "title, titles, title line, titel",
    ("quotes", "yes", "no"): "quotation marks, quotes, quote marks, double quotes, anführungszeichen",
    ("postscript", "yes", "no"): "postscript, post scriptum",
    ("questions", "yes", "no"): "question, questions, follow up question, follow up questions",
    ("numbers", "digits", "words"): "digits, numerals",
    (
        "length",
        "longer",
        "shorter",
    ): "detail, details, depth, elaboration, détails, détail, detalles, dettagli, detalhes",
    ("humor", "yes", "no"): "joke, jokes, humor, humour, puns, sarcasm, witze, blagues, chistes",
    ("formality", "casual", "formal"): "slang, contractions, colloquialisms",
    # Seen so that their parts are not.
    ("", None, None): "for example, for instance, the list, at length",
}
MANNERS = {
    (
        "length",
        "shorter",
        "longer",
    ): """short, shorter, brief, briefer, briefly, concise, concisely, terse, tersely, succinct, succinctly,
        compact, condensed, brevity, to the point, shorten, condense, kurz, kurze, kürzer, kürzere, knapp, knapper, court, courte,
        courts, courtes, bref, brève, brèves, concis, breve, breves, corto, corta, cortos, cortas, conciso, concisa, curto, curta,
        curtos, curtas""",
    (
        "length",
        "longer",
        "shorter",
    ): """long, longer, lengthy, in depth, elaborate, thorough, thoroughly, comprehensive, detailed,
        extensive, lang, lange, länger, längere, ausführlich, ausführlicher, ausführliche, detailliert, detaillierter, longue, longues,
        détaillé, détaillée, largo, larga, largos, largas, detallado, detallada, lungo, lunga, longo, longa""",
    ("length", "shorter", None): "fewer words, less words, less text, fewer sentences",
    ("length", "shorter", "shorter"): "too many words, so many words, too much text, so much text",
    ("length", "longer", None): "more words, more text, more sentences, too few words",
    ("length", None, "shorter"): "verbose, wordy, rambling, long winded, chatty",
    (
        "formality",
        "formal",
        "casual",
    ): """formal, formally, professional, professionally, formell, formeller, förmlich, förmlicher,
        formel, formelle""",
    (
        "formality",
        "casual",
        "formal",
    ): """casual, casually, informal, informally, colloquial, conversational, laid back, relaxed,
        locker, lockerer, informell, informel, informelle, coloquial""",
    ("tone", "friendly", "neutral"): "friendly, friendlier, warm, warmer, freundlich, freundlicher, amical, amable",
    ("tone", "neutral", "friendly"): "neutral, matter of fact, sachlich",
    ("tone", None, "friendly"): "cold, dry, robotic, impersonal, stiff",
    ("humor", "yes", "no"): "funny, funnier, humorous, witty, playful, lustig, drôle, divertido",
    ("humor", "no", "yes"): "serious",
    (
        "case",
        "lower",
        "not lower",
    ): """lowercase, lower case, lowercase letters, lower case letters, small letters, kleinbuchstaben,
        minuscules, minúsculas, minuscole""",
    (
        "case",
        "upper",
        "not upper",
    ): """uppercase, upper case, uppercase letters, upper case letters, all caps, caps, caps lock, capitals,
        capital letters, block letters, großbuchstaben, majuscules, mayúsculas, maiuscole""",
    (
        "case",
        "normal",
        "not normal",
    ): """normal capitalization, normal capitalisation, normal case, normal casing, sentence case,
        proper capitalization, proper capitalisation, regular capitalization, standard capitalization""",
    ("numbers", "words", None): "spell out numbers, numbers as words, numbers in words, spell numbers out",
    ("numbers", "digits", None): "numbers as digits",
}
LANGUAGES = {
    "english": "english englisch anglais inglés inglese inglês",
    "german": "german deutsch allemand alemán tedesco alemão",
    "french": "french französisch français francés francese francês",
    "spanish": "spanish spanisch espagnol español castellano spagnolo espanhol",
    "italian": "italian italienisch italien italiano",
    "portuguese": "portuguese portugiesisch portugais portugués portoghese português",
    "russian": "russian russisch russe ruso",
    "chinese": "chinese mandarin chinesisch chinois chino",
    "japanese": "japanese japanisch",
    "arabic": "arabic arabisch",
} | {
    name: name
    for name in words("dutch swedish polish turkish ukrainian greek hebrew hindi korean thai vietnamese indonesian")
}

CONCEPTS: dict[str, Concept] = {
    **{p: Concept(*meaning, is_noun=True) for meaning, text in NOUNS.items() for p in phrases(text)},
    **{p: Concept(*meaning) for meaning, text in MANNERS.items() for p in phrases(text)},
    **{
        w: Concept("language", name, f"not {name}", is_noun=True)
        for name, text in LANGUAGES.items()
        for w in words(text)
    },
}
CONCEPT_STARTS = frozenset(phrase.split()[0] for phrase in CONCEPTS)
MAX_CONCEPT_WORDS = max(len(phrase.split()) for phrase in CONCEPTS)

# Already a comparison: "a bit shorter" asks, where "a bit short" complains.
COMPARATIVES = words(
    """shorter briefer longer friendlier warmer funnier kürzer kürzere knapper länger längere ausführlicher formeller förmlicher lockerer
    freundlicher"""
)
