"""Candidates judged on a tiny model: margins by example, general ability, generated replies, the frontier, and what is decided by them."""

import math

import pytest
import torch

from service.domain.policy import Limits, decide
from service.domain.slow_weights import Reject, TrainReport
from tests.candidates import candidate, heldout, random_adapter, teach
from tests.consolidation_data import corrections, user_log
from workers.consolidation.ability import answer, measure_ability, questions
from workers.consolidation.anchors import load_anchors
from workers.consolidation.candidates import OwnContext
from workers.consolidation.gate import Meter, fit_scales
from workers.consolidation.generated import loops, repetition, reverse_kl_nats, say
from workers.consolidation.generated import report as generated
from workers.consolidation.handoff import COSTS_NOTHING_NATS
from workers.consolidation.judgement import judge
from workers.consolidation.lora import LoraStack, Shape
from workers.consolidation.margins import Arm, measure, measure_rivals, rows_alone, rows_with
from workers.consolidation.rows import Row
from workers.consolidation.scoring import reply_logprobs
from workers.consolidation.speaker import Speaker

ROOMY = {"text": 50.0, "chat": 50.0}
BUDGET_TOKENS = 500
SHAPE = Shape(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))


@pytest.fixture(scope="module")
def log():
    return user_log(corrections("ann", count=8))


@pytest.fixture(scope="module")
def held(tiny_base, log):
    return heldout(tiny_base, log, last=5, budget_tokens=BUDGET_TOKENS)


@pytest.fixture(scope="module")
def anchors(tiny_base, tmp_path_factory):
    return load_anchors(tiny_base, cache=tmp_path_factory.mktemp("anchors"), limit=8, progress=lambda *_: None)


@pytest.fixture
def judges(tiny_base):
    with LoraStack.attached(tiny_base, SHAPE, slots=4) as stack:
        yield stack


def own(log, *, absorbed=frozenset()):
    return OwnContext(state=log.fast_weights, absorbed=absorbed, budget_tokens=BUDGET_TOKENS)


def judged(base, trained, judges, anchors, candidates, limits=Limits()):
    meter = Meter(base, trained, judges, anchors, candidates, on_pass=lambda: None)
    fitted = fit_scales(meter.measure, len(candidates))
    judgements = judge(base, judges, anchors, candidates, fitted, meter=meter, limits=limits, on_pass=lambda: None)
    return fitted, judgements


def report(judgement):
    return TrainReport(
        **judgement.report(),
        train_examples=8,
        heldout_examples=5,
        steps=1,
        first_loss=1.0,
        last_loss=0.5,
        seconds=1.0,
        device="cpu",
    )


def test_a_margin_is_the_difference_of_mean_log_probabilities_of_its_example(tiny_base, judges, held):
    random_adapter(judges, 1, size=0.1)
    c = [p.alone for p in held]
    found = measure(tiny_base, judges, [Arm(held, c, None), Arm(held, c, 1)])
    for row, of_base, of_adapter in zip(c, *found, strict=True):
        for slot, margin in ((None, of_base), (1, of_adapter)):
            with torch.no_grad(), judges.on(slot):
                wanted, unwanted = (
                    tiny_base.model(torch.tensor([[*row.prompt, *reply]])).logits[0].log_softmax(-1)[
                        range(len(row.prompt) - 1, len(row.prompt) + len(reply) - 1), reply
                    ].mean().item()
                    for reply in row.replies
                )  # fmt: skip
            assert margin == pytest.approx(wanted - unwanted, abs=1e-4)


def test_what_serves_now_has_its_own_context_and_the_pooled_adapter_serves_where_there_is_no_other(
    tiny_base, judges, held, log, tmp_path
):
    random_adapter(judges, 1, size=0.1)
    random_adapter(judges, 2, size=0.1, seed=1)
    gone = frozenset(list(log.fast_weights.exemplars)[:2])
    current = candidate(tmp_path / "a", heldout=held, current=1, pooled=2, context=own(log, absorbed=gone))
    pooled = candidate(tmp_path / "b", heldout=held, pooled=2, context=own(log))
    neither = candidate(tmp_path / "c", heldout=held)
    first, second, third = measure_rivals(tiny_base, judges, [current, pooled, neither])
    alone = rows_alone(current)
    expected = measure(
        tiny_base,
        judges,
        [
            Arm(held, rows_with(tiny_base, current, gone), 1),
            Arm(held, rows_with(tiny_base, pooled), 2),
            Arm(held, [p.row(context=True) for p in held], None),
            Arm(held, alone, 1),
            Arm(held, alone, 2),
        ],
    )
    assert [first.serving, second.serving, third.serving, first.current, second.pooled] == [
        pytest.approx(margins, abs=1e-4) for margins in expected
    ]
    assert first.serving != pytest.approx(second.serving, abs=1e-2)
    assert (second.current, third.pooled) == (None, None)
    assert third.serving == third.base_with_context


def test_an_adapter_that_hurts_the_multiple_choice_set_is_rejected(tiny_base, judges):
    rows = questions(tiny_base)
    # It learns a wrong answer of each question, in place of the right one.
    teach(tiny_base, judges, 1, [Row(r.prompt, (r.replies[1], r.replies[0])) for r in rows[:20]], steps=30)
    same, worse = measure_ability(tiny_base, judges, [0, 1])
    assert (same.questions, same.accuracy, same.margin_change.mean) == (
        60,
        same.base_accuracy,
        pytest.approx(0.0, abs=1e-5),
    )
    assert worse.accuracy < worse.base_accuracy
    assert worse.margin_change.lower95 < -Limits().ability_loss_nats
    from tests.unit.test_policy_decide import report as good

    assert not isinstance(decide(good(ability=same)), Reject)
    assert "the right answers of 60 general questions lose" in " ".join(decide(good(ability=worse)).reasons)


def test_an_answer_is_right_where_it_is_likelier_than_all_three_wrong_ones(tiny_base, judges):
    scores = torch.stack(reply_logprobs(tiny_base, questions(tiny_base)))
    [answered] = answer(tiny_base, judges, [None])
    assert answered.right == (scores.argmax(dim=1) == 0).float().tolist()


def test_repetition_is_the_share_of_phrases_that_were_there_before():
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0.0
    assert repetition([1, 2, 3]) == 0.0
    # Ten 4-grams of which only the three rotations of 1 2 3 are different.
    assert repetition([1, 2, 3] * 4 + [1]) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([*range(20), *[7] * 12], True),
        ([*range(20), *[7, 8, 9] * 4], True),
        ([*range(20), *range(100, 112), *range(100, 112), *range(100, 112)], True),
        ([*range(20), *[7] * 11], False),
        ([*[7] * 30, 1, 2, 3], False),
        ([*range(20), 5, 6, 5, 6], False),
        ([], False),
    ],
)
def test_a_loop_is_a_reply_that_ends_by_saying_the_same_over_and_over(tokens, looping):
    assert loops(tokens) is looping


def test_a_candidate_that_only_memorised_repetition_is_rejected(tiny_base, judges, anchors, held, tmp_path):
    stuck = tuple(tiny_base.encode_reply("yes yes yes yes yes yes yes yes yes yes yes", ended=False))
    teach(tiny_base, judges, 1, [Row(p.alone.prompt, (stuck,)) for p in held], steps=60)
    candidates = [candidate(tmp_path / str(n), slot=n, heldout=held) for n in range(2)]
    said = say(
        Speaker(tiny_base, judges),
        candidates,
        anchors.of("chat", "judge"),
        scales=[1.0, 1.0],
        left_out=[frozenset(), frozenset()],
    )
    untaught, repeats = (generated(tiny_base, c, replies) for c, replies in zip(candidates, said, strict=True))
    assert (untaught.repetition, untaught.tokens, untaught.loops) == (
        untaught.base_repetition,
        untaught.base_tokens,
        untaught.base_loops,
    )
    assert repeats.repetition > repeats.base_repetition + Limits().repetition_rise
    assert repeats.reverse_kl_nats > 0.1 > untaught.reverse_kl_nats
    from tests.unit.test_policy_decide import report as good

    assert "4-grams" in " ".join(decide(good(generated=repeats)).reasons)


def test_norms_are_held_up_to_replies_as_they_are_served_now_and_as_they_would_be(
    tiny_base, judges, anchors, held, log, tmp_path
):
    seen = []

    def adherence(prompt, reply):
        seen.append((prompt, reply))
        return len(seen) / 10

    random_adapter(judges, 1, size=0.3)
    normed = candidate(tmp_path / "a", slot=1, heldout=held, context=own(log), adherence=adherence)
    speaker = Speaker(tiny_base, judges)
    [replies] = say(speaker, [normed], anchors.of("chat", "judge"), scales=[1.0], left_out=[frozenset()])
    said = generated(tiny_base, normed, replies)
    assert (said.adherence_before, said.adherence) == (pytest.approx(0.3), pytest.approx(0.8))
    asked = [p.example.messages[-1].content for p in held]
    assert [prompt for prompt, _ in seen] == asked + asked
    assert [reply for _, reply in seen[:5]] != [reply for _, reply in seen[5:]]


def test_reverse_kl_is_exact_on_the_adapters_own_samples_and_nothing_for_the_base(tiny_base, judges, anchors):
    random_adapter(judges, 1, size=0.2)
    prompts = [a.row.prompt for a in anchors.of("chat", "judge")[:3]]
    none, some = reverse_kl_nats(tiny_base, judges, prompts, slots=[0, 1])
    assert none == pytest.approx(0.0, abs=1e-6)
    assert some > 1e-3
    assert reverse_kl_nats(tiny_base, judges, prompts, slots=[1]) == [pytest.approx(some, rel=1e-3)]


@pytest.fixture(scope="module")
def trained(tiny_base, held):
    """One that learnt what the user wants, one that learnt the opposite."""
    with LoraStack.attached(tiny_base, SHAPE, slots=2) as stack:
        rows = [p.alone for p in held]
        teach(tiny_base, stack, 0, rows, steps=15)
        teach(tiny_base, stack, 1, [Row(r.prompt, r.replies[::-1]) for r in rows], steps=15)
    return stack


def test_a_whole_judgement_of_two_scopes_side_by_side(tiny_base, trained, judges, anchors, held, log, tmp_path):
    candidates = [
        candidate(tmp_path / str(n), trained=n, slot=n, heldout=held, context=own(log), budgets=ROOMY) for n in range(2)
    ]
    _, (learnt, opposite) = judged(tiny_base, trained, judges, anchors, candidates)
    assert learnt.margins.against_base.lower95 > 0.0 > opposite.margins.against_base.mean
    assert learnt.margins.against_base.positive == 5
    assert learnt.margins.candidate - learnt.margins.base == pytest.approx(learnt.margins.against_base.mean)
    # The 2x2, and what would serve with what is left of the context.
    whole = learnt.margins.candidate_with_context
    assert learnt.margins.base_with_context != whole
    assert learnt.margins.would_serve >= whole - COSTS_NOTHING_NATS
    assert learnt.context_tokens_after <= learnt.context_tokens_before
    assert learnt.price.tokens_saved == learnt.context_tokens_before - learnt.context_tokens_after
    assert set(learnt.absorbed) == {item.item for item in learnt.handed if item.absorbed}
    assert (learnt.notes == ()) == (learnt.scale == 1.0)
    decision = decide(report(opposite))
    assert isinstance(decision, Reject)
    assert "does not beat the base" in " ".join(decision.reasons)


def test_the_frontiers_kl_grows_with_the_scale_and_the_chosen_scale_is_on_it(
    tiny_base, trained, judges, anchors, held, tmp_path
):
    candidates = [candidate(tmp_path / str(n), trained=n, slot=n, heldout=held) for n in range(2)]
    fitted, judgements = judged(tiny_base, trained, judges, anchors, candidates)
    for c, largest, judgement in zip(candidates, fitted, judgements, strict=True):
        points = judgement.frontier
        assert [p.scale for p in points] == pytest.approx([f * largest.scale for f in (0.25, 0.5, 0.75, 1.0)])
        for kl in ([p.kl_text_nats for p in points], [p.kl_chat_nats for p in points]):
            assert kl == sorted(kl)
            assert 0.0 < kl[0] < kl[-1]
        best = max(points, key=lambda p: p.value_nats)
        assert judgement.scale == best.scale
        assert judgement.kl_chat.mean_nats == best.kl_chat_nats
        # What lies in the folder and in the slot is what was chosen.
        trained.export(c.trained, tmp_path, scale=judgement.scale)
        assert (c.folder / "adapter_model.safetensors").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()  # fmt: skip
        judges.load(3, c.folder)
        assert torch.equal(judges.weights_U_N[3], judges.weights_U_N[c.slot])


def test_a_scale_is_chosen_and_items_leave_only_while_replies_keep_the_users_style(
    tiny_base, trained, judges, anchors, held, log, tmp_path
):
    def judgement(style):
        c = candidate(tmp_path / "a", heldout=held, context=own(log), budgets=ROOMY, style=style)
        return judged(tiny_base, trained, judges, anchors, [c])[1][0]

    def styled(*means):
        """A style by which rounds of five replies have these means, the last one from there on."""
        asked = []

        def near(prompt, reply):
            asked.append(prompt)
            return means[min((len(asked) - 1) // 5, len(means) - 1)]

        return near, asked

    by_likelihood = judgement(None)
    assert by_likelihood.absorbed
    assert by_likelihood.generated.style is None

    # As served now, then at the scale that is worth most, then with the whole context and with none.
    kept, asked = styled(1.0, 0.96)
    as_good = judgement(kept)
    assert as_good.scale == by_likelihood.scale
    assert set(as_good.absorbed) == set(log.fast_weights.items)
    assert asked[:5] == [p.example.asked for p in held]

    elsewhere, _ = styled(1.0, 0.9, 1.0)
    at_another = judgement(elsewhere)
    assert at_another.absorbed
    assert at_another.scale != by_likelihood.scale
    assert "replies would be less as the user wants" in at_another.notes[0]

    lost, _ = styled(1.0, 1.0, 1.0, 0.9)
    nothing = judgement(lost)
    assert (nothing.absorbed, nothing.scale) == ((), by_likelihood.scale)
    assert not any(item.absorbed for item in nothing.handed)
    assert nothing.context_tokens_after == nothing.context_tokens_before
    assert nothing.margins.would_serve == nothing.margins.candidate_with_context


@pytest.mark.parametrize("limits", [Limits(min_value_nats=99.0), Limits(serving_loss_nats=-99.0)])
def test_nothing_is_handed_off_that_the_gate_would_refuse(
    tiny_base, trained, judges, anchors, held, log, tmp_path, limits
):
    c = candidate(tmp_path / "a", heldout=held, context=own(log), budgets=ROOMY, style=lambda prompt, reply: 1.0)
    assert judged(tiny_base, trained, judges, anchors, [c])[1][0].absorbed
    assert judged(tiny_base, trained, judges, anchors, [c], limits)[1][0].absorbed == ()


def test_where_no_scale_fits_the_judgement_is_of_the_base_and_says_so(
    tiny_base, trained, judges, anchors, held, tmp_path
):
    nothing_fits = candidate(tmp_path / "a", heldout=held, budgets={"text": 1e-12, "chat": 1e-12})
    _, [judgement] = judged(tiny_base, trained, judges, anchors, [nothing_fits])
    assert (judgement.scale, len(judgement.frontier)) == (0.0, 1)
    assert "no scale above 0 fits the budgets" in judgement.notes
    assert judgement.margins.candidate == pytest.approx(judgement.margins.base, abs=1e-5)
    assert isinstance(decide(report(judgement)), Reject)


def test_two_held_out_examples_are_said_to_be_few(tiny_base, trained, judges, anchors, held, tmp_path):
    few = candidate(tmp_path / "a", heldout=held[:2], budgets=ROOMY)
    _, [judgement] = judged(tiny_base, trained, judges, anchors, [few])
    assert judgement.notes[0].startswith("2 held-out examples: the bounds say little")
    assert math.isfinite(judgement.price.value_nats)
