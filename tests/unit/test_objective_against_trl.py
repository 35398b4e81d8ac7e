"""Our losses against TRL's own trainers, on one batch: values and gradients.

TRL computes its loss from tokens by its own forward pass over padded sequences; we by ours over packed rows. So what agrees here is the
whole way from tokens to the loss. KTO, IPO and CISPO are the three of its losses that ours follow, and GKD's divergence the fourth.

Letters: E examples (one reply each, so also R replies), T tokens, N reply tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.gkd import GKDTrainer

from workers.consolidation.base import Base
from workers.consolidation.objective import MARGIN_NATS, RATE_SLOPE, distill_kl, pair_loss, rate_loss
from workers.consolidation.policy_gradient import cispo_loss
from workers.consolidation.rows import Row, pack, token_logprobs

AGREE = 1e-5
PROMPTS = ((5, 9, 17, 30, 8), (40, 12), (7, 7, 90, 3), (200, 33, 21))
# Of unlike lengths, and four of one length.
REPLIES = ((40, 41, 42), (50, 51, 52, 53, 54), (60,), (70, 71))
EVEN = ((40, 41, 42), (50, 51, 52), (60, 61, 62), (70, 71, 72))
OTHERS = ((150, 151, 152, 153), (160,), (170, 171, 172), (180, 181))
TEXT = {"prompt": "p", "completion": "c", "chosen": "c", "rejected": "d"}


@pytest.fixture(autouse=True)
def _untold(monkeypatch):
    """TRL tells its authors of each trainer that is made, but not in CI."""
    monkeypatch.setenv("CI", "true")


@pytest.fixture(scope="module")
def reference(tiny_base: Base) -> Base:
    return tiny_base


@pytest.fixture(scope="module")
def policy(tiny_base: Base) -> Base:
    """The base after some training, as it were: far enough that ratios are not 1."""
    model = deepcopy(tiny_base.model).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return dataclasses.replace(tiny_base, model=model)


def dataset(trainer: str) -> Dataset:
    """What a trainer wants to see when it is made; the batch itself is handed to its loss."""
    columns = {"kto": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "grpo": ("prompt",)}[trainer]
    rows = [{name: TEXT[name] for name in columns} for _ in range(4)]
    return Dataset.from_list([{**row, "label": n % 2 == 0} for n, row in enumerate(rows)] if trainer == "kto" else rows)


def options(folder: Path, **own: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        **own,
    }


def made(kind: Callable[..., Any], policy: Base, path: Path, **arguments: Any) -> Any:
    """A trainer of TRL's on a copy of the policy, because it changes the model that it is given."""
    trainer = kind(model=deepcopy(policy.model), processing_class=AutoTokenizer.from_pretrained(path), **arguments)
    trainer.model.train()
    return trainer


def padded(prompts: Sequence[tuple[int, ...]], replies: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    """Sequences as TRL's collators lay them: prompt and reply, padded at the right."""
    whole = [(*prompt, *reply) for prompt, reply in zip(prompts, replies, strict=True)]
    longest = max(map(len, whole))

    def rows(values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in values])

    marks = [[0] * len(p) + [1] * len(r) for p, r in zip(prompts, replies, strict=True)]
    return {
        "input_ids": rows(whole),
        "attention_mask": rows([[1] * len(row) for row in whole]),
        "completion_mask": rows(marks),
    }


def ours(base: Base, prompts: Sequence[tuple[int, ...]], replies: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities by token (N,) and their means by reply (E,), with gradient."""
    rows = [Row(prompt, (reply,)) for prompt, reply in zip(prompts, replies, strict=True)]
    packed = pack(rows, device=base.device)
    logprobs_N = token_logprobs(base.states(packed), base.head, packed.target_N)
    return logprobs_N, packed.mean_by_reply(logprobs_N)


def gains(
    policy: Base, reference: Base, prompts: Sequence[tuple[int, ...]], replies: Sequence[tuple[int, ...]]
) -> Tensor:
    """h of each reply, nats per token, shape (E,)."""
    with torch.no_grad():
        reference_E = ours(reference, prompts, replies)[1]
    return ours(policy, prompts, replies)[1] - reference_E


def assert_agrees(our_loss: Tensor, policy: Base, their_loss: Tensor, trainer: Any) -> None:
    """The two losses, and the gradients of every parameter, neither of which is zero."""
    assert our_loss.item() == pytest.approx(their_loss.item(), abs=AGREE)
    assert abs(our_loss.item()) > 100 * AGREE
    found = torch.autograd.grad(our_loss, list(policy.model.parameters()))
    expected = torch.autograd.grad(their_loss, list(trainer.model.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=AGREE)
    assert max(a.abs().max().item() for a in found) > 100 * AGREE


def test_ratings_cost_what_ktos_cost(policy, reference, tiny_model_path, tmp_path):
    """KTO sums over tokens where we take means, so at one length L of all replies its beta is our slope / L."""
    config = KTOConfig(**options(tmp_path, beta=RATE_SLOPE / 3, train_sampling_strategy="sequential"))
    trainer = made(
        KTOTrainer,
        policy,
        tiny_model_path,
        ref_model=deepcopy(reference.model),
        args=config,
        train_dataset=dataset("kto"),
    )
    mismatched = EVEN[-1:] + EVEN[:-1]
    batch = padded(PROMPTS, EVEN)
    batch |= {f"KL_{name}": value for name, value in padded(PROMPTS, mismatched).items()}
    batch["label"] = torch.tensor([True, False, True, False])
    h_E, z_E = (gains(policy, reference, PROMPTS, replies) for replies in (EVEN, mismatched))
    assert z_E.mean() > 0, "or z would be 0 in both"
    loss = rate_loss(h_E, torch.tensor([1.0, -1.0, 1.0, -1.0]), z_E.mean().expand(4)).mean()
    assert_agrees(loss, policy, trainer.compute_loss(trainer.model, batch), trainer)


def test_preferences_cost_what_ipos_cost(policy, reference, tiny_model_path, tmp_path):
    config = DPOConfig(**options(tmp_path, loss_type="ipo", beta=1 / (2 * MARGIN_NATS)))
    trainer = made(
        DPOTrainer,
        policy,
        tiny_model_path,
        ref_model=deepcopy(reference.model),
        args=config,
        train_dataset=dataset("dpo"),
    )
    batch = padded(PROMPTS * 2, REPLIES + OTHERS)
    wanted_E, unwanted_E = (gains(policy, reference, PROMPTS, replies) for replies in (REPLIES, OTHERS))
    loss = pair_loss(wanted_E, unwanted_E, torch.zeros(4), torch.zeros(4)).mean()
    assert_agrees(loss, policy, trainer.compute_loss(trainer.model, batch), trainer)


def test_rollouts_cost_what_grpos_cispo_costs(policy, reference, tiny_model_path, tmp_path):
    """The reference plays the model that sampled, moved so that ratios lie on both sides of the cap."""
    config = GRPOConfig(
        **options(tmp_path, loss_type="cispo", epsilon_high=4.0, beta=0.0, num_generations=4, temperature=1.0)
    )
    trainer = made(
        GRPOTrainer,
        policy,
        tiny_model_path,
        args=config,
        train_dataset=dataset("grpo"),
        reward_funcs=lambda **_: [0.0] * 4,
    )
    trainer.current_gradient_accumulation_steps = 1
    logprobs_N, _ = ours(policy, PROMPTS, REPLIES)
    with torch.no_grad():
        old_N = ours(reference, PROMPTS, REPLIES)[0] - torch.linspace(-2, 2, len(logprobs_N))
    ratio_N = (logprobs_N - old_N).exp()
    assert ratio_N.min() < 1
    assert ratio_N.max() > 4
    advantages_E = torch.tensor([1.2, -0.7, 0.4, -0.9])
    lengths = [len(reply) for reply in REPLIES]
    loss = cispo_loss(logprobs_N, old_N, advantages_E.repeat_interleave(torch.tensor(lengths)))

    batch = rollouts(PROMPTS, REPLIES)
    mask = batch["completion_mask"].bool()
    old_E_T = torch.zeros(mask.shape).masked_scatter(mask, old_N)
    batch |= {"advantages": advantages_E, "old_per_token_logps": old_E_T, "num_items_in_batch": mask.sum()}
    assert_agrees(loss, policy, trainer.compute_loss(trainer.model, batch), trainer)


def rollouts(prompts: Sequence[tuple[int, ...]], replies: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    """As GRPO lays them: prompts padded at the left, completions at the right."""
    wide, long = max(map(len, prompts)), max(map(len, replies))
    return {
        "prompt_ids": torch.tensor([[0] * (wide - len(p)) + list(p) for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor([[*r, *[0] * (long - len(r))] for r in replies]),
        "completion_mask": torch.tensor([[1] * len(r) + [0] * (long - len(r)) for r in replies]),
    }


def test_distillation_costs_what_gkds_reverse_divergence_costs(policy, reference):
    """GKD's beta of 1 is the reverse divergence; its "batchmean" is over the tokens that are no padding."""
    rows = [Row(prompt, (reply,)) for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    packed = pack(rows, device=policy.device)
    student, teacher = policy.states(packed), reference.states(packed)
    loss_R = distill_kl(
        teacher_states_N_D=teacher,
        student_states_N_D=student,
        head_V_D=reference.head,
        reply_N=packed.reply_N,
        replies=packed.replies,
    )
    lengths = torch.tensor([float(len(reply)) for reply in REPLIES])
    ours = (loss_R * lengths).sum() / lengths.sum()
    logits = [(states @ reference.head.T)[None] for states in (student, teacher)]
    theirs = GKDTrainer.generalized_jsd_loss(*logits, labels=torch.zeros(1, len(student), dtype=torch.long), beta=1)
    assert ours.item() == pytest.approx(theirs.item(), abs=AGREE)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, atol=AGREE)
    assert gradients[0].abs().max() > 100 * AGREE
