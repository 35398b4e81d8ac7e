"""What the person who runs `fastslow up` sees."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console


class Terminal:
    """Lines, and a spinner while something long goes on."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        # A terminal that was closed must not keep the stack from being stopped in order.
        with suppress(OSError):
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Say what is being waited for; a spinner turns until it is over, where there is a terminal to draw on."""
        if not self._console.is_terminal:
            self.say(f"{text}...")
            yield
            return
        with self._console.status(text):
            yield
