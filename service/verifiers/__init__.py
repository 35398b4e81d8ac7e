"""Tasks whose rewards a program checks, each verdict with words on what was wrong: for Fast-Slow training, and norms of a scope.

star-graph-<D>x<L>     search: the way from the centre of a star of D arms of length L to the end of one (star_graph.py)
gym:<dataset>          any generator of the package reasoning-gym; gym-easy:<dataset> for shorter problems (gym.py)
norms:<name>           house norms of replies to everyday questions, checked as IFEval does (house.py)

The packages behind gym and norms come with the extra `verifiers` and are imported when they are first needed.
"""

from service.errors import InvalidRequest
from service.verifiers import gym, house, star_graph
from service.verifiers.problems import Problem, Split, Task, Verdict

__all__ = ["Problem", "Split", "Task", "Verdict", "task", "task_names"]


def task(name: str) -> Task:
    """The task of this name.

    Raises:
        InvalidRequest: there is none; the message lists those that there are.
    """
    for find in (star_graph.find, gym.find, house.find):
        found = find(name)
        if found is not None:
            return found
    raise InvalidRequest(
        f"There is no task '{name[:80]}'. Known tasks: {', '.join(task_names())}; any other star-graph-<arms>x<length> up to "
        f"{star_graph.MAX_ARMS}x{star_graph.MAX_LENGTH}, and any gym:<dataset> of reasoning-gym.",
        param="task",
        code="unknown_task",
    )


def task_names() -> tuple[str, ...]:
    """Tasks to begin with; more exist by their patterns (see above)."""
    return (*star_graph.NAMES, *gym.NAMES, *house.NAMES)
