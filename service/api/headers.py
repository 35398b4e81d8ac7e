"""A request's headers by name, as every chat asks for a few of them."""

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> str | None:
    """The first of that name, which ASGI has in lower case; each byte of the value is a character."""
    for told, value in scope["headers"]:
        if told == name:
            found: str = value.decode("latin-1")
            return found
    return None
