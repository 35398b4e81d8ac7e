"""`fastslow fst run` in a terminal: a bar, a line for every point of the curves, what came of it."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from service.settings import Settings
from workers.consolidation.base import load_base
from workers.fst.folder import State
from workers.fst.plan import Plan
from workers.fst.run import train


def run(plan: Plan, out: Path, *, settings: Settings, limit_seconds: float, console: Console) -> bool:
    """Run the plan in the folder; whether it is finished.

    Raises:
        FastslowError: it can't be run; the message says why and what to do.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        steps = bar.add_task(f"{plan.arm} on {', '.join(plan.tasks)}", total=plan.steps)

        def on_point(state: State, record: dict[str, Any]) -> None:
            bar.update(steps, completed=state.step)
            bar.console.print(line_of(record), highlight=False)

        result = train(
            plan,
            out,
            base=lambda: load_base(settings),
            settings=settings,
            on_point=on_point,
            on_step=lambda step: bar.update(steps, completed=step),
            limit_seconds=limit_seconds,
        )
    if result is None:
        console.print(f"The time is up: the same command goes on in {out}.", highlight=False)
        return False
    for text in summary(result):
        console.print(text, highlight=False)
    console.print(f"Everything is in {out}.", highlight=False)
    return True


def line_of(record: dict[str, Any]) -> str:
    """One point of the curves."""
    train_reward = "-" if record["train_reward"] is None else f"{record['train_reward']:.3f}"
    return (
        f"step {record['step']:>4}  samples {record['samples']:>6}  reward train {train_reward:>5} test {record['test_reward']:.3f}  "
        f"KL {record['kl_nats']:.3f} (anchors: text {record['kl_text_nats']:.3f}, chat {record['kl_chat_nats']:.3f})  "
        f"context {record['context_tokens']:.0f} tokens"
    )


def summary(result: dict[str, Any]) -> list[str]:
    """The 2x2, and what is left within the KL budget."""
    lines = [
        f"{cell['weights']:>5} weights {'with' if cell['context'] else 'without'} contexts: reward {cell['reward']:.3f}, "
        f"KL {cell['kl_nats']:.3f} nats per token"
        for cell in result["two_by_two"]
    ]
    if budgeted := result.get("budgeted"):
        lines.append(f"Within the KL budget: scale {budgeted['scale']:.2f}, reward {budgeted['reward']:.3f}.")
    return lines
