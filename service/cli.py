"""The command `fastslow`. Each command imports what it needs when it runs, so that `fastslow --help` is quick."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.settings import Settings

# "Try again": what sysexits.h has a program end with whose work isn't done yet.
EX_TEMPFAIL = 75

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


fst = typer.Typer(name="fst", help="Fast-Slow Training on tasks whose reward a program checks.", no_args_is_help=True)
app.add_typer(fst)


@fst.command("tasks")
def fst_tasks() -> None:
    """List the tasks, and what each is about."""
    from service.verifiers import task, task_names

    for name in task_names():
        typer.echo(f"{name:<24}  {task(name).about}")


@fst.command("run")
def fst_run(
    task: Annotated[
        list[str], typer.Option(help="A name that `fastslow fst tasks` lists; several with --switch-steps.")
    ],
    out: Annotated[Path, typer.Option(help="The run's folder; the same command goes on with a run that was stopped.")],
    arm: Annotated[
        str, typer.Option(help="fst: contexts and weights; rl: weights; context: contexts; distill.")
    ] = "fst",
    steps: Annotated[int | None, typer.Option(help="Policy-gradient steps [60].")] = None,
    steps_per_cycle: Annotated[
        int | None, typer.Option(help="Steps between two evolutions of the contexts [6].")
    ] = None,
    contexts: Annotated[int | None, typer.Option(help="Contexts of the population [4].")] = None,
    rollouts: Annotated[int | None, typer.Option(help="Replies to a problem in a step [8].")] = None,
    rollouts_by: Annotated[
        str | None,
        typer.Option(
            help="worker: this process generates; vllm: that of FASTSLOW_VLLM_URL, else of `fastslow up` [worker]."
        ),
    ] = None,
    batch_problems: Annotated[int | None, typer.Option(help="Problems in a step [32].")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Most tokens of a reply [64].")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="Most tokens of a context [384].")] = None,
    evolution_calls: Annotated[
        int | None, typer.Option(help="Replies scored for new contexts in a cycle [96].")
    ] = None,
    anchor_problems: Annotated[int | None, typer.Option(help="Problems that contexts are scored on [16].")] = None,
    train_problems: Annotated[int | None, typer.Option(help="Problems to draw from [256].")] = None,
    test_problems: Annotated[int | None, typer.Option(help="Problems of each measurement [32].")] = None,
    count_cut_off: Annotated[
        bool | None, typer.Option(help="Score replies that did not end too; else they earn 0 (so by default).")
    ] = None,
    test_samples: Annotated[int | None, typer.Option(help="Replies to each of them [1].")] = None,
    switch_steps: Annotated[
        int | None, typer.Option(help="Steps after which the next task follows; 0: never [0].")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="lora, or full: all layers but the embeddings [lora].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="0 takes the default of the kind of weights [0].")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps in which the learning rate rises [10].")] = None,
    kl_coefficient: Annotated[float | None, typer.Option(help="Weight of the KL term in the loss [0.001].")] = None,
    seed: Annotated[int | None, typer.Option(help="[0]")] = None,
    start: Annotated[str | None, typer.Option(help="Folder of another run, whose weights to begin with.")] = None,
    limit_seconds: Annotated[
        float, typer.Option(help="Stop after the cycle in which these end; exit status 75.")
    ] = 1e9,
    queue: Annotated[
        bool, typer.Option("--queue", help="Send it to a consolidation worker that sees the folder.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Train on tasks with a checkable reward. Ctrl-C stops it; all up to the last cycle is kept."""
    from service.errors import FastslowError

    given: dict[str, object] = {
        "steps": steps,
        "steps_per_cycle": steps_per_cycle,
        "contexts": contexts,
        "rollouts": rollouts,
        "rollouts_by": rollouts_by,
        "batch_problems": batch_problems,
        "new_tokens": new_tokens,
        "context_tokens": context_tokens,
        "evolution_calls": evolution_calls,
        "anchor_problems": anchor_problems,
        "train_problems": train_problems,
        "test_problems": test_problems,
        "count_cut_off": count_cut_off,
        "test_samples": test_samples,
        "switch_steps": switch_steps,
        "weights": weights,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "kl_coefficient": kl_coefficient,
        "seed": seed,
        "start": start,
    }
    fields: dict[str, object] = {"tasks": tuple(task), "arm": arm}
    fields |= {name: value for name, value in given.items() if value is not None}
    try:
        finished = _fast_slow(fields, out, limit_seconds=limit_seconds, queue=queue, data_dir=data_dir)
    except FastslowError as error:
        raise _problem(error.message) from None
    except OSError as error:
        raise _problem(f"{error.filename or out} can't be used: {error.strerror}.") from None
    except KeyboardInterrupt:
        typer.echo("Stopped: the same command goes on after the last cycle.", err=True)
        raise typer.Exit(130) from None
    if not finished:
        raise typer.Exit(EX_TEMPFAIL)


def _fast_slow(
    fields: dict[str, object], out: Path, *, limit_seconds: float, queue: bool, data_dir: Path | None
) -> bool:
    """Run or queue it; False if the time ended first. What trains is found by name, as the queue finds its tasks."""
    import asyncio
    from importlib import import_module

    from rich.console import Console

    from service.jobs import CeleryJobs
    from service.keys import with_own_vllm_key
    from service.verifiers import task as task_of

    settings = _settings(data_dir=data_dir)
    plan = import_module("workers.fst.plan").checked_plan(**fields)
    for name in plan.tasks:
        task_of(name)
    if plan.rollouts_by == "vllm" and settings.own_vllm:
        settings = with_own_vllm_key(settings)
    if queue:
        asyncio.run(CeleryJobs(settings).fast_slow(plan.model_dump(mode="json"), str(out.absolute())))
        typer.echo(f"Queued: a worker of the queue `consolidate` will write into {out.absolute()}.")
        return True
    try:
        command = import_module("workers.fst.command")
    except ModuleNotFoundError as error:
        raise _problem(f"{error}: training needs the extra `workers`, as in `pip install fastslow[workers]`.") from None
    return bool(command.run(plan, out, settings=settings, limit_seconds=limit_seconds, console=Console()))


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
