"""The hard KL budget at the end of a run: what was learnt is scaled down until its export is within it, as consolidation's gate does."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from service.settings import Settings
from workers.consolidation.anchors import KINDS, Anchors, Kind
from workers.consolidation.divergence import summarize
from workers.consolidation.gate import Measured, fit_scales
from workers.fst.measure import anchors_kl
from workers.fst.policy import Policy, restore, snapshot


def fitted(policy: Policy, anchors: Anchors, *, out: Path, settings: Settings) -> Measured:
    """Scale what was learnt to both budgets; the policy and the export in `out` are left at that scale.

    Each measurement exports and reads the files again, so that what is measured is what is kept. The judging anchors decide, which
    nothing here is trained on.
    """
    learnt = snapshot(policy)
    budgets: dict[Kind, float] = {"text": settings.kl_text_budget_nats, "chat": settings.kl_chat_budget_nats}

    def measured(scale: float) -> Measured:
        restore(policy, learnt)
        folder = policy.export(out, scale=scale)
        policy.load(out)
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors"))))
        kl = {}
        for kind in KINDS:
            judges = anchors.of(kind, "judge")
            tokens = sum(len(anchor.row.replies[0]) for anchor in judges)
            kl[kind] = summarize(anchors_kl(policy, judges), tokens=tokens, budget_nats=budgets[kind])
        return Measured(scale=scale, sha256=digest.hexdigest(), kl=kl)

    def measure(scales: Mapping[int, float]) -> dict[int, Measured]:
        last.extend(scales.values())
        return {number: measured(scale) for number, scale in scales.items()}

    last: list[float] = []
    chosen = fit_scales(measure, 1)[0]
    # The search need not end with what it chooses.
    return chosen if last[-1] == chosen.scale else measured(chosen.scale)
