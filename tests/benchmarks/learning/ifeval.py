"""IFEval's checkers (arXiv 2311.07911) from the package `if-verifiable`, without the package's own entry module.

That imports `datasets`, hundreds of megabytes, for a download that nothing here makes; the checkers need none of it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

Check = Callable[[str], bool]
"""Whether a reply follows an instruction."""

PACKAGE = "if_verifiable"


def _checkers() -> dict[str, Any]:
    if PACKAGE not in sys.modules:
        found = importlib.util.find_spec(PACKAGE)
        if found is None:
            raise ImportError("if-verifiable is not installed: `make .venv` installs it")
        package = ModuleType(PACKAGE)
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules[PACKAGE] = package
    registry = importlib.import_module(f"{PACKAGE}.ifeval.instructions_registry")
    checkers: dict[str, Any] = registry.INSTRUCTION_DICT
    return checkers


def ifeval(instruction: str, **arguments: object) -> Check:
    """The checker of one of IFEval's 25 instructions, such as `startend:end_checker`, with its arguments."""
    checker = _checkers()[instruction](instruction)
    checker.build_description(**arguments)
    return lambda reply: bool(reply.strip()) and bool(checker.check_following(reply))
