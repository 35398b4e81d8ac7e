"""Guidelines that nobody has said: what the user's corrections and preferences have in common."""

from collections.abc import Sequence

from service.domain.comments import contradicts
from service.domain.fast_weights import FastWeights
from service.domain.inference import Pair, infer
from service.domain.items import Guideline, guideline_id
from workers.consolidation.dataset import Example

# On trial at a time: each costs scorings, and what is proven makes room for the next.
MAX_TRIALS = 2


def on_trial(state: FastWeights, examples: Sequence[Example]) -> list[Guideline]:
    """Guidelines inferred from the examples' pairs, the strongest first; none that contradicts what the user said or took out.

    A guideline's sources are the examples without which it would not have been inferred: they can't prove it.
    """
    pairs = {e.id: Pair(e.prompt, e.reply, e.rejected) for e in examples if e.rejected is not None}
    without = {name: _said_by([p for other, p in pairs.items() if other != name]) for name in pairs}
    found = []
    for candidate in infer(list(pairs.values())):
        name = guideline_id(candidate.text)
        known = name in state.guidelines or name in state.removed or state.resolve(name) != name
        if not known and not any(g.stated and contradicts(g.text, candidate.text) for g in state.guidelines.values()):
            hinges = [e for e, said in without.items() if (candidate.axis, candidate.value) not in said]
            found.append(
                Guideline(
                    id=name,
                    text=candidate.text,
                    sources=dict.fromkeys(hinges, state.revision),
                    origin="inferred",
                    since=state.revision,
                )
            )
    return found[:MAX_TRIALS]


def _said_by(pairs: list[Pair]) -> set[tuple[str, str]]:
    return {(candidate.axis, candidate.value) for candidate in infer(pairs)}
