"""How far a reply holds its scope's norms: reward in training and in the gate, and the live metric of adherence."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.domain.norms import Norm
from service.verifiers.checkers import checker_of
from service.verifiers.problems import Verdict


@dataclass(frozen=True)
class Finding:
    """One norm held against one reply."""

    norm: Norm
    problem: str | None
    """What is wrong and how to mend it; None where the norm is held."""


def findings(norms: Sequence[Norm], prompt: str, reply: str) -> list[Finding]:
    """Each norm against the reply. One that is empty, or only says the prompt again, holds none.

    Raises:
        VerifiersMissing: the extra `verifiers` is not installed.
    """
    said = " ".join(reply.split()).casefold()
    nothing = None
    if not said:
        nothing = "the reply is empty; answer the question"
    elif said == " ".join(prompt.split()).casefold():
        nothing = "the reply only repeats the question; answer it"
    return [Finding(norm, nothing or checker_of(norm)(reply)) for norm in norms]


def adherence(norms: Sequence[Norm], prompt: str, reply: str) -> Verdict:
    """The weighted share of the norms that the reply holds, and which it does not, why, and how to. Without norms all is well.

    Args:
        prompt: the last user message's text.

    Raises:
        VerifiersMissing: the extra `verifiers` is not installed.
    """
    found = findings(norms, prompt, reply)
    total = sum(f.norm.weight for f in found)
    broken = [f for f in found if f.problem is not None]
    if not broken:
        return Verdict(reward=1.0, feedback="All norms are held." if norms else "There are no norms.")
    kept = [f"Held: {f.norm.text}" for f in found if f.problem is None]
    missed = [f"Not held: {f.norm.text} But {f.problem}." for f in broken]
    reward = 1.0 - sum(f.norm.weight for f in broken) / total
    return Verdict(reward=min(1.0, max(0.0, reward)), feedback="\n".join([*missed, *kept]))
