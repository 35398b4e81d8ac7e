"""How vocabularies are written: words parted by blanks, phrases by commas, a line for a group."""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def phrases(text: str) -> frozenset[str]:
    return frozenset(phrase.strip() for phrase in text.split(","))
