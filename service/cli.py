"""The command `fastslow`. Each command imports what it needs when it runs, so that `fastslow --help` is quick."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.settings import Settings

app = typer.Typer(
    name="fastslow",
    help="Online personalization for self-hosted LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Holds everything that a local stack keeps [env: FASTSLOW_DATA_DIR].")
]
Port = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="The gateway's port [env: FASTSLOW_PORT].")]


@app.callback()
def commands() -> None:
    """Online personalization for self-hosted LLMs. Settings are environment variables FASTSLOW_*; see service/settings.py."""


@app.command()
def up(port: Port = None, data_dir: DataDir = None) -> None:
    """Start a local stack: Redis, vLLM, gateway, worker, scheduler. Ctrl-C stops it.

    Where FASTSLOW_REDIS_URL or FASTSLOW_VLLM_URL is set, that one is used and none is started for it.
    """
    from rich.console import Console

    from service.stack.terminal import Terminal
    from service.stack.up import up as start

    settings = _settings(port=port, data_dir=data_dir)
    raise typer.Exit(start(settings, Terminal(Console())))


@app.command()
def keys(data_dir: DataDir = None) -> None:
    """Show the API keys. They are made first if there are none."""
    from service.errors import FastslowError
    from service.keys import ensure_keys

    path = _settings(data_dir=data_dir).keys_path
    try:
        held = ensure_keys(path)
    except FastslowError as error:
        raise _problem(error.message) from None
    except OSError as error:
        raise _problem(f"The keys file {path} can't be made: {error.strerror}.") from None
    for key in held.api_keys:
        typer.echo(f"{key.role:<6}  {key.tenant}  {key.key}")
    typer.echo(f"They are kept in {path}.", err=True)


def _settings(*, port: int | None = None, data_dir: Path | None = None) -> "Settings":
    """The environment's settings under the options given; one line where a value is not valid."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from service.settings import Settings

    given = {"port": port, "data_dir": data_dir}
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        raise _problem(f"FASTSLOW_{str(first['loc'][0]).upper()} is not valid: {first['msg']}.") from None
    except SettingsError as error:
        raise _problem(f"{error}.") from None


def _problem(line: str) -> typer.Exit:
    typer.echo(line, err=True)
    return typer.Exit(1)
