"""Consolidation on the default model: it learns from real corrections, and its published file keeps to the KL budgets."""

from pathlib import Path

import pytest

from service.domain.slow_weights import Promote, Scope
from service.settings import Settings
from tests.consolidation_data import LENIENT, corrections, user_log
from workers.consolidation.anchors import KINDS, load_anchors
from workers.consolidation.base import load_base
from workers.consolidation.job import consolidate
from workers.consolidation.work import Outcome, Progress, Work


def kl_by_plain_libraries(model_path, adapter, rows):
    """Forward KL of each anchor by transformers and peft alone: one sequence at a time, nothing packed, cached or chunked."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32), adapter)
    means = []
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.replies[0]]])
        at = slice(len(row.prompt) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            p = base(ids).logits[0, at].double().log_softmax(-1)
            q = tuned(ids).logits[0, at].double().log_softmax(-1)
        means.append((p.exp() * (p - q)).sum(-1).mean().item())
    return means


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_corrections_are_learnt_within_the_budgets_as_plain_peft_measures_them(model_path: Path, tmp_path: Path):
    settings = Settings(
        _env_file=None,
        model=str(model_path),
        data_dir=tmp_path,
        worker_device="cpu",
        anchors=12,
        train_steps=6,
        context_budget_tokens=160,
        user_min_feedbacks=12,
    )
    base = load_base(settings)
    work = Work(
        tenant="acme",
        scope=Scope(kind="user", name="ann"),
        job="job-1",
        number=1,
        created=1.0,
        users={"ann": user_log(corrections("ann", count=12))},
    )
    seen: list[Progress] = []
    ends = consolidate([work], base=base, settings=settings, progress=lambda _, p: seen.append(p), limits=LENIENT)
    outcome = ends["job-1"]
    assert isinstance(outcome, Outcome), outcome
    report = outcome.report
    assert outcome.decision == Promote(), outcome.decision
    assert report.margins.candidate > report.margins.base + 0.1
    assert report.peak_memory_bytes < 4e9
    assert {p.stage for p in seen} == {"data", "anchors", "train", "measure", "judge", "publish"}

    anchors = load_anchors(base, cache=tmp_path / "anchors", limit=12, progress=lambda *_: None)
    published = settings.adapter_store_dir / outcome.version.name
    for kind, told in zip(KINDS, (report.kl_text, report.kl_chat), strict=True):
        measured = kl_by_plain_libraries(model_path, published, [a.row for a in anchors.of(kind, "judge")])
        assert sum(measured) / len(measured) == pytest.approx(told.mean_nats, rel=0.01, abs=1e-5)
        assert max(measured) == pytest.approx(told.worst_nats, rel=0.01, abs=1e-5)
        assert told.upper95_nats <= told.budget_nats
