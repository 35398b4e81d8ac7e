"""Small edits of a context that need no language model: exemplars from verified replies, guidelines from the verifier's words, crossing."""

from collections.abc import Callable, Sequence
from random import Random

from workers.context_search.mutations import first_unseen
from workers.fst.contexts import Shown, TaskContext
from workers.fst.material import Material, sentences

# More guidelines than this a small model no longer follows, and the prompt grows.
MOST_GUIDELINES = 4


class Edits:
    """Children of contexts, none of which was seen before.

    Args:
        fits: whether a context is within the budget of tokens.
    """

    def __init__(self, material: Material, *, fits: Callable[[TaskContext], bool], random: Random) -> None:
        self.material = material
        """What edits are made of; it grows while they are tried."""
        self._fits = fits
        self._random = random
        self._seen: set[TaskContext] = set()

    def unseen(self, context: TaskContext) -> TaskContext | None:
        """The context; None where it was tried before or does not fit."""
        if context in self._seen or not self._fits(context):
            return None
        self._seen.add(context)
        return context

    def child(self, parent: TaskContext, others: Sequence[TaskContext], said: Sequence[str]) -> TaskContext | None:
        """A new context one edit away from `parent`, or between it and one of the `others`; None where none was found.

        Args:
            said: the verifier's feedback on the parent's replies.
        """
        edits: list[Callable[[TaskContext], TaskContext | None]] = [self.swap, self.drop, self.move]
        edits.append(lambda context: self.advise(context, said))
        # Small models follow exemplars and hardly any advice: one exemplar took the default model from 0.06 to 0.31 on a task, advice to 0.
        edits += [self.show] * 2
        if others:
            edits.append(lambda context: self.cross(context, self._random.choice(others)))
        return first_unseen(edits, parent, unseen=self.unseen, chance=self._random)

    def show(self, parent: TaskContext) -> TaskContext | None:
        """One exemplar more, at the end."""
        there = {shown.prompt for shown in parent.exemplars}
        left = [f.shown for f in self.material.good if f.shown.prompt not in there]
        return _with(parent, exemplars=(*parent.exemplars, self._random.choice(left))) if left else None

    def swap(self, parent: TaskContext) -> TaskContext | None:
        """Another exemplar in the place of one."""
        there = {shown.prompt for shown in parent.exemplars}
        left = [f.shown for f in self.material.good if f.shown.prompt not in there]
        if not parent.exemplars or not left:
            return None
        place, new = self._random.randrange(len(parent.exemplars)), self._random.choice(left)
        return _with(parent, exemplars=(*parent.exemplars[:place], new, *parent.exemplars[place + 1 :]))

    def drop(self, parent: TaskContext) -> TaskContext | None:
        """One item fewer."""
        guidelines, exemplars = parent.guidelines, parent.exemplars
        if not guidelines and not exemplars:
            return None
        place = self._random.randrange(len(guidelines) + len(exemplars))
        if place < len(guidelines):
            return _with(parent, guidelines=guidelines[:place] + guidelines[place + 1 :])
        place -= len(guidelines)
        return _with(parent, exemplars=exemplars[:place] + exemplars[place + 1 :])

    def move(self, parent: TaskContext) -> TaskContext | None:
        """The exemplars in another order: the last one has the most influence."""
        if len(parent.exemplars) < 2:
            return None
        return _with(parent, exemplars=tuple(self._random.sample(parent.exemplars, len(parent.exemplars))))

    def advise(self, parent: TaskContext, said: Sequence[str]) -> TaskContext | None:
        """One guideline more, made of what the verifier says of several problems: of these failures if it can be, else of any."""
        known = {advice.text for advice in self.material.advice} - set(parent.guidelines)
        heard = [text for feedback in said for text in sentences(feedback) if text in known]
        texts = heard or [advice.text for advice in self.material.advice if advice.text in known]
        if not texts or len(parent.guidelines) >= MOST_GUIDELINES:
            return None
        return _with(parent, guidelines=(*parent.guidelines, self._random.choice(texts)))

    def cross(self, parent: TaskContext, other: TaskContext) -> TaskContext | None:
        """Guidelines of one and exemplars of the other, or a mixture of the exemplars."""
        if self._random.random() < 0.5:
            return _with(parent, guidelines=other.guidelines)
        both = dict.fromkeys((*parent.exemplars, *other.exemplars))
        mixed = tuple(shown for shown in both if self._random.random() < 0.5)
        prompts = {shown.prompt: shown for shown in mixed}
        return _with(parent, exemplars=tuple(prompts.values()))


def _with(
    context: TaskContext, *, guidelines: tuple[str, ...] | None = None, exemplars: tuple[Shown, ...] | None = None
) -> TaskContext:
    changes = {"guidelines": guidelines, "exemplars": exemplars}
    return context.model_copy(update={name: value for name, value in changes.items() if value is not None})
