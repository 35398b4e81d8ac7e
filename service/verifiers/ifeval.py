"""IFEval's checkers (arXiv 2311.07911) from the package `if-verifiable`, without the package's own entry module.

That imports `datasets`, hundreds of megabytes, for a download that nothing here makes; the checkers need none of it.
"""

import threading
from collections.abc import Callable
from typing import Any

from service.verifiers.packages import imported, without_entry

Check = Callable[[str], bool]
"""Whether a reply follows an instruction."""

PACKAGE = "if_verifiable"
# langdetect loads its profiles at the first call, and a second thread would not wait for them.
DETECTING = threading.Lock()


def ifeval(instruction: str, **arguments: object) -> Check:
    """The checker of one of IFEval's 25 instructions, such as `startend:end_checker`, with its arguments.

    Raises:
        VerifiersMissing: the extra `verifiers` is not installed.
    """
    without_entry(PACKAGE)
    checker = imported(f"{PACKAGE}.ifeval.instructions_registry").INSTRUCTION_DICT[instruction](instruction)
    checker.build_description(**arguments)
    return lambda reply: bool(reply.strip()) and bool(checker.check_following(reply))


def sentences(text: str) -> list[str]:
    """The text's sentences by IFEval's own rules. (Its check of their number asks a model that has to be downloaded.)"""
    without_entry(PACKAGE)
    found: list[str] = imported(f"{PACKAGE}.ifeval.instructions_util").split_into_sentences(text)
    return found


def language_of(text: str) -> str:
    """The likeliest language's ISO 639-1 code, `zh-cn` or `zh-tw`; empty where the text holds no letters. The same for the same text."""
    detector: Any = imported("langdetect")
    # It draws at random; a seed makes every draw the same.
    detector.DetectorFactory.seed = 0
    if not any(character.isalpha() for character in text):
        return ""
    try:
        with DETECTING:
            return str(detector.detect(text))
    except imported("langdetect.lang_detect_exception").LangDetectException:
        return ""
