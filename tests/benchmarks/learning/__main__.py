"""`python -m tests.benchmarks.learning`: does the service learn what its users want, and from how many feedbacks?

Simulated users with hidden, checkable preferences chat with the running service and give noisy feedback through its public interface;
after 0, 1, 2, 5, 10 and 20 feedbacks each, all arms answer the same test questions. An interrupted run is taken up where it stopped.
"""

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
from rich.console import Console

from service.keys import load_keys
from service.settings import Settings
from tests.benchmarks import processes
from tests.benchmarks.learning.arms import CHANNELS, PLAIN, SLOW
from tests.benchmarks.learning.client import Endpoint, Refused, Service
from tests.benchmarks.learning.folder import STACK, OtherRun, Run, open_run
from tests.benchmarks.learning.peers import Peer
from tests.benchmarks.learning.plan import ARMS, SIZES, Plan, plan
from tests.benchmarks.learning.session import execute
from tests.benchmarks.terminal import terminal
from tests.e2e.stack import Stack, running

CONCURRENCY = 12
"""Requests at a time, which vLLM batches."""


def named(values: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE options by name."""
    pairs = [value.partition("=") for value in values]
    for name, _, value in pairs:
        if not name or not value:
            raise SystemExit(f"expected NAME=VALUE, not {name!r}")
    return {name: value for name, _, value in pairs}


def peers_of(options: argparse.Namespace) -> list[Peer]:
    urls, feedback = named(options.peer), named(options.peer_feedback)
    models, keys = named(options.peer_model), named(options.peer_key)
    if unknown := (feedback.keys() | models.keys() | keys.keys()) - urls.keys():
        raise SystemExit(f"no --peer of the name {', '.join(sorted(unknown))}")
    return [
        Peer(name, Endpoint(url, model=models.get(name, options.model), key=keys.get(name, "")), feedback.get(name, ""))
        for name, url in urls.items()
    ]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, help="an even number; the size's by default, as for the next two")
    parser.add_argument("--tests", type=int, help="test questions")
    parser.add_argument("--points", help="feedbacks after which is measured, such as 0,5,10")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join((*PLAIN, *CHANNELS))}")
    parser.add_argument("--slow", action="store_true", help=f"and the arms that wait for adapters: {', '.join(SLOW)}")
    parser.add_argument(
        "--small-chat-budget", type=float, metavar="NATS", help="of the consolidation that serves both-small"
    )
    parser.add_argument("--folder", type=Path, help="default: data/bench-learning/SIZE-SEED, or SIZE-SEED-slow")
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY)
    running_service = parser.add_argument_group("a running service, instead of a stack of its own")
    running_service.add_argument("--url", help="such as http://127.0.0.1:8080")
    running_service.add_argument("--keys-file", type=Path, help="its keys.json")
    running_service.add_argument("--model", default=Settings().model_name)
    rivals = parser.add_argument_group("rivals: any OpenAI-compatible endpoint as an arm; each option may be repeated")
    rivals.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="URL with /v1")
    rivals.add_argument(
        "--peer-feedback", action="append", default=[], metavar="NAME=URL", help="takes our feedback body"
    )
    rivals.add_argument("--peer-model", action="append", default=[], metavar="NAME=MODEL")
    rivals.add_argument("--peer-key", action="append", default=[], metavar="NAME=KEY")
    options = parser.parse_args(given)
    options.arms = tuple(dict.fromkeys([*options.arms.split(","), *(SLOW if options.slow else ())]))
    if unknown := set(options.arms) - {*PLAIN, *CHANNELS}:
        parser.error(f"no arm {', '.join(sorted(unknown))}")
    if (options.url is None) != (options.keys_file is None):
        parser.error("--url and --keys-file go together")
    return options


def chosen_plan(options: argparse.Namespace) -> Plan:
    """The size's plan with what the options change."""
    points = options.points and tuple(int(point) for point in options.points.split(","))
    changes = {"users": options.users, "tests": options.tests, "points": points}
    changes["small_chat_budget_nats"] = options.small_chat_budget
    given = {name: value for name, value in changes.items() if value}
    return plan(options.size, seed=options.seed, arms=options.arms, **given)


def stack_settings(chosen: Plan) -> dict[str, object]:
    """What a stack of its own is told where the plan consolidates."""
    if not set(chosen.arms) & set(SLOW):
        return {}
    return {
        # As the service has it: end-to-end tests train for a third of the steps, against fewer anchors.
        **{name: Settings.model_fields[name].default for name in ("train_steps", "anchors")},
        # Some feedbacks say nothing that can be learnt ("meh"), and whoever has given as many as the last point says has done their part.
        "user_min_feedbacks": max(2, chosen.points[-1] * 3 // 4),
        # Eight at a time on two busy cores.
        "job_limit_seconds": 6 * 3600,
        # Nobody kills workers here, and one may be slow to show that it lives.
        "lease_seconds": 60,
    }


def main() -> None:
    options = arguments()
    chosen = chosen_plan(options)
    name = "-".join([chosen.size, str(chosen.seed), *(["slow"] if stack_settings(chosen) else [])])
    folder = options.folder or Path("data") / "bench-learning" / name
    console = terminal()
    with ExitStack() as stack:
        stack.enter_context(processes.tidy_end())
        model = Path(processes.model_folder())
        where = " ".join([options.url or "a stack of its own", *options.peer])
        try:
            run = open_run(folder.absolute(), chosen, where=where)
        except OtherRun as problem:
            raise SystemExit(str(problem)) from None
        console.print(f"{'going on' if run.resumed else 'beginning'} in {folder}")
        url, keys_file = options.url, options.keys_file
        if url is None:
            console.print("starting a stack of its own (about a minute)")
            (run.folder / STACK).mkdir(exist_ok=True)
            own: Stack = stack.enter_context(running(run.folder / STACK, model, **stack_settings(chosen)))
            url, keys_file = own.url, own.data_dir / "keys.json"
        keys = load_keys(keys_file)
        line = asyncio.run(
            measured(
                run, chosen, options, url=url, client=keys.first("client"), admin=keys.first("admin"), console=console
            )
        )
    print(line)


async def measured(
    run: Run, chosen: Plan, options: argparse.Namespace, *, url: str, client: str, admin: str, console: Console
) -> str:
    service = Service(url, model=options.model, client_key=client, admin_key=admin)
    peers = peers_of(options)
    try:
        return await execute(run, chosen, service, peers, concurrency=options.concurrency, console=console)
    except* (httpx.TransportError, Refused) as problems:
        problem = problems.exceptions[0]
        raise SystemExit(f"{problem or type(problem).__name__}: the same command goes on from here") from None
    finally:
        for endpoint in (service, *(peer.endpoint for peer in peers)):
            await endpoint.close()


if __name__ == "__main__":
    processes.as_command(main)
