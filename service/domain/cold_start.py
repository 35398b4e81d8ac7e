"""Where a new user starts from: guidelines that helped others of the cohort or the tenant, and such as an admin wrote for them.

Nobody's words reach anybody else. What counts here of a user is a guideline that the optimizer inferred in words of the closed vocabulary
(`inference.py`), kept for several of them, and sums of credit.

To its user a prior is worth the posterior mean (4 w m + praise) / (4 + praise + blame), where m is the others' mean, and praise and blame
are the user's own credit of it. w = 4 / (4 + own feedbacks) lets the others' word fade as the user gives feedback of any kind.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence

from service.domain.comments import contradicts, stances
from service.domain.edits import guideline_wording
from service.domain.fast_weights import FastWeights
from service.domain.feedback import Frozen
from service.domain.items import Credit, Prior, guideline_id

# The others' word counts as this many feedbacks; so does an admin's, and no single user's counts for more.
PRIOR_STRENGTH = 4.0
# More would crowd out what the user says.
MAX_PRIORS = 16
MAX_WRITTEN = 8
"""Of one scope."""


class ColdStart(Frozen):
    """What one tenant's new users start from."""

    revision: int = 0
    """Counts the writes, so that none goes unseen."""
    enabled: bool = False
    priors: dict[str, tuple[Prior, ...]] = {}
    """By scope (`global`, `cohort:<name>`). Those that an admin wrote stay when it is switched off; what was learnt goes."""

    def switched(self, enabled: bool) -> "ColdStart":
        """With cold start on or off."""
        priors = self.priors if enabled else {scope: _written(kept) for scope, kept in self.priors.items()}
        return self.model_copy(update={"enabled": enabled, "priors": priors})

    def with_written(self, scope: str, texts: Iterable[str]) -> "ColdStart":
        """With these texts as all that an admin wrote for a scope; one that stays keeps its evidence."""
        standing = self.priors.get(scope, ())
        known = {p.id: p for p in standing}
        written: dict[str, Prior] = {}
        for text in map(guideline_wording, texts):
            name = guideline_id(text)
            prior = known.get(name) or Prior(id=name, text=text, mean=_mean(written=True))
            written[name] = prior.model_copy(update={"text": text, "written": True})
        learnt = [p for p in standing if not p.written and p.id not in written]
        return self.model_copy(update={"priors": {**self.priors, scope: ranked([*written.values(), *learnt])}})


class Evidence:
    """What the users of one scope say of guidelines: sums, without anybody's words or name.

    Args:
        known: ids whose credit counts though a user may not have them as items of their own: priors that they were served.
        shareable: whether a text is of the closed vocabulary.
    """

    def __init__(self, known: Collection[str], *, shareable: Callable[[str], bool]) -> None:
        self._known = known
        self._shareable = shareable
        self._texts: dict[str, str] = {}
        self._users: Counter[str] = Counter()
        self._helpful: defaultdict[str, float] = defaultdict(float)
        self._harmful: defaultdict[str, float] = defaultdict(float)

    def add(self, state: FastWeights) -> None:
        """Count one more user."""
        kept = {g.id: g.text for g in state.guidelines.values() if g.origin == "inferred" and self._shareable(g.text)}
        self._texts |= kept
        self._users.update(kept.keys())
        for name in state.credits:
            if name in kept or name in self._known:
                credit = _at_most(state.credit(name), PRIOR_STRENGTH)
                self._helpful[name] += credit.helpful
                self._harmful[name] += credit.harmful
        for name in state.removed:
            if name in self._known:
                self._harmful[name] += PRIOR_STRENGTH

    def priors(self, standing: Sequence[Prior], *, min_users: int) -> tuple[Prior, ...]:
        """What the scope's new users start from: the standing ones that an admin wrote, and what enough users have in common."""
        written = {p.id: p.text for p in standing if p.written}
        learnt = {name: text for name, text in self._texts.items() if self._users[name] >= min_users}
        return ranked(
            Prior(
                id=name,
                text=text,
                users=self._users[name],
                written=name in written,
                mean=_mean(
                    helpful=self._helpful[name] + self._users[name],
                    harmful=self._harmful[name],
                    written=name in written,
                ),
            )
            for name, text in {**learnt, **written}.items()
        )


def starting(cohort: Iterable[Prior], tenant: Iterable[Prior]) -> tuple[Prior, ...]:
    """The cohort's and the tenant's as one list: what an admin wrote, then the cohort's. None twice, none against an earlier one, and
    nothing learnt about what an earlier one already speaks of ("under about 20 words" and "under about 30").
    """
    order = sorted([*((p, 0) for p in cohort), *((p, 1) for p in tenant)], key=lambda o: (not o[0].written, o[1]))
    kept: list[Prior] = []
    spoken_of: set[str] = set()
    for prior, _ in order:
        axes = stances(prior.text).keys()
        if any(prior.id == other.id or contradicts(other.text, prior.text) for other in kept):
            continue
        if prior.written or not axes & spoken_of:
            kept.append(prior)
            spoken_of |= axes
    return tuple(kept[:MAX_PRIORS])


def offered(state: FastWeights, priors: Iterable[Prior]) -> list[Prior]:
    """The priors that a user has neither taken for their own, nor changed, nor removed."""
    known = state.guidelines.keys() | state.aliases.keys() | state.removed.keys()
    return [prior for prior in priors if prior.id not in known]


def posterior(prior: Prior, credit: Credit, *, clock: int) -> float:
    """The posterior mean of a prior's being helpful to its user; see above.

    Args:
        credit: the user's own, at `clock`.
        clock: feedbacks that the user has given.
    """
    helpful = PRIOR_STRENGTH * prior.mean * PRIOR_STRENGTH / (PRIOR_STRENGTH + clock)
    return credit.mean(helpful=helpful, harmful=PRIOR_STRENGTH - helpful)


def ranked(priors: Iterable[Prior]) -> tuple[Prior, ...]:
    """Written ones first, then by mean; no more than are of use."""
    return tuple(sorted(priors, key=lambda p: (not p.written, -p.mean, -p.users, p.id))[:MAX_PRIORS])


def _written(priors: Iterable[Prior]) -> tuple[Prior, ...]:
    return tuple(p for p in priors if p.written)


def _mean(*, helpful: float = 0.0, harmful: float = 0.0, written: bool) -> float:
    by_admin = PRIOR_STRENGTH if written else 0.0
    return round(Credit(helpful=helpful + by_admin, harmful=harmful).mean(), 4)


def _at_most(credit: Credit, evidence: float) -> Credit:
    """The same opinion, with no more weight than this."""
    scale = min(1.0, evidence / max(credit.helpful + credit.harmful, evidence))
    return credit.model_copy(update={"helpful": credit.helpful * scale, "harmful": credit.harmful * scale})
