"""The packages of the extra `verifiers`, imported when they are first needed: the gateway starts without them."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from service.errors import VerifiersMissing


def imported(module: str) -> Any:
    """A module of the extra.

    Raises:
        VerifiersMissing: it, or something that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise VerifiersMissing(
            f"{module} can't be imported ({error}): install the extra `verifiers`, as in `pip install fastslow[verifiers]`.",
            retry_after_seconds=60,
        ) from error


def without_entry(package: str) -> None:
    """Let the parts of a package be imported without its own entry module, where that imports what the parts don't need.

    Raises:
        VerifiersMissing: it is not installed.
    """
    if package in sys.modules:
        return
    found = importlib.util.find_spec(package)
    if found is None:
        raise VerifiersMissing(
            f"{package} is not installed: install the extra `verifiers`, as in `pip install fastslow[verifiers]`.",
            retry_after_seconds=60,
        )
    bare = ModuleType(package)
    bare.__path__ = list(found.submodule_search_locations or ())
    # Two threads may come here at once.
    sys.modules.setdefault(package, bare)
