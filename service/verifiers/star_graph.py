"""The star-graph search of Fast-Slow Training (arXiv 2605.12484; the graph is of arXiv 2403.06963).

A star of D arms of L edges meets in a centre; the edges come in random order, and the path from the centre to the end of one arm is
asked for. Guessing an arm is right once in D, so a model that can't look ahead is rewarded rarely, or never.
"""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import InvalidRequest
from service.verifiers.problems import Problem, Split, Task, Verdict, problem_id, split_of

NAMES = ("star-graph-2x2", "star-graph-2x3", "star-graph-3x3", "star-graph-5x5")
NAME = re.compile(r"star-graph-(\d{1,2})x(\d{1,2})")
MAX_ARMS, MAX_LENGTH = 20, 20
# Two digits each, so that all nodes look alike to a tokenizer.
NODES = range(10, 100)
PATH = re.compile(r"\d+(?:\s*(?:->|→|–>|-|–|>|to)\s*\d+)+")


@dataclass(frozen=True)
class StarGraph:
    """Paths in stars of so many arms of so many edges."""

    arms: int
    length: int

    @property
    def name(self) -> str:
        return f"star-graph-{self.arms}x{self.length}"

    @property
    def about(self) -> str:
        return (
            f"Find the way from the centre of a star of {self.arms} arms to the end of one, {self.length} edges away."
        )

    def problems(self, split: Split, *, count: int, seed: int) -> list[Problem]:
        """Stars that differ; see `Task`."""
        rng = random.Random(f"{self.name} {split} {seed}")
        found: dict[str, Problem] = {}
        while len(found) < count:
            problem = self._problem(rng)
            if split_of(problem.prompt) == split:
                found[problem.prompt] = problem
        return list(found.values())

    def _problem(self, rng: random.Random) -> Problem:
        centre, *others = rng.sample(NODES, 1 + self.arms * self.length)
        arms = [[centre, *others[n :: self.arms]] for n in range(self.arms)]
        edges = [edge for arm in arms for edge in itertools.pairwise(arm)]
        rng.shuffle(edges)
        path = rng.choice(arms)
        prompt = (
            f"Edges of a graph: {', '.join(f'{a}->{b}' for a, b in edges)}.\n"
            f"Find the path from {centre} to {path[-1]}, along the edges. Reply with the path alone, as a->b->c."
        )
        return Problem(problem_id(self.name, prompt), prompt, lambda reply: judge(reply, path=path, edges=edges))


def find(name: str) -> Task | None:
    """The task, if the name is one of a star graph.

    Raises:
        InvalidRequest: it is, but of a star that can't be drawn.
    """
    match = NAME.fullmatch(name)
    if match is None:
        return None
    arms, length = int(match[1]), int(match[2])
    if not (2 <= arms <= MAX_ARMS and 1 <= length <= MAX_LENGTH and arms * length < len(NODES)):
        raise InvalidRequest(
            f"'{name}' can't be drawn: 2 to {MAX_ARMS} arms of 1 to {MAX_LENGTH} edges, fewer than {len(NODES)} in all.",
            param="task",
            code="unknown_task",
        )
    return StarGraph(arms, length)


def judge(reply: str, *, path: Sequence[int], edges: Sequence[tuple[int, int]]) -> Verdict:
    """1 for the path, else 0, with where the last path in the reply first goes wrong."""
    right, start, goal = "->".join(map(str, path)), path[0], path[-1]
    written = PATH.findall(reply)
    if not written:
        return Verdict(
            reward=0.0, feedback=f"The reply holds no path such as {start}->...->{goal}. The path is {right}."
        )
    walked = [int(node) for node in re.findall(r"\d+", written[-1])]
    if walked == list(path):
        return Verdict(reward=1.0, feedback=f"Right: {right}.")
    problem = _problem_with(walked, path=path, edges=edges)
    advice = f"Work back from {goal}: look for the edge that ends in it, then for the one before."
    return Verdict(reward=0.0, feedback=f"Wrong: {problem} {advice} The path is {right}.")


def _problem_with(walked: Sequence[int], *, path: Sequence[int], edges: Sequence[tuple[int, int]]) -> str:
    start, goal = path[0], path[-1]
    if walked[0] != start:
        return f"the path must begin at {start}, not at {walked[0]}."
    for step, edge in enumerate(itertools.pairwise(walked), start=1):
        if edge not in edges:
            return f"step {step} goes from {edge[0]} to {edge[1]}, and no edge does."
        if edge[1] not in path:
            return f"step {step} goes to {edge[1]}, which is on another arm than {goal}."
    return f"the path stops at {walked[-1]} before it reaches {goal}."
