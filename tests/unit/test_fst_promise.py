"""What contexts promise by replies of before: the estimate itself, the replies that it is made of, and that the search follows it."""

import pytest
import torch

from service.verifiers import Problem, Verdict
from tests.unit.test_fst_evolution import PROBLEMS, evolved, material_of
from workers.consolidation.rows import Row, pack, token_logprobs
from workers.fst.contexts import EMPTY, Shown, TaskContext
from workers.fst.promise import CLIP_NATS, EXTREMES, MOST_GROUPS, Evidence, promises
from workers.fst.rollouts import Asked, Rollout

PARENT = TaskContext(exemplars=(Shown(prompt="Ask 9", reply="eee"),))
CHILDREN = (EMPTY, TaskContext(guidelines=("Say it.",)), TaskContext(exemplars=(Shown(prompt="Ask 7", reply="oo"),)))


def replied(problem, reply, reward, context=EMPTY):
    return Rollout(
        Asked(problem, context),
        (1,),
        reply,
        (-1.0,) * len(reply),
        "",
        Verdict(reward=reward, feedback="As the test says."),
    )


def evidence_of(*groups):
    """Groups of (reply's tokens, reward), one a problem."""
    evidence = Evidence()
    for problem, group in zip(PROBLEMS, groups, strict=False):
        evidence = evidence.with_replies([replied(problem, reply, reward) for reply, reward in group])
    return evidence


def log_likelihood(base, context, prompt, reply):
    """By a pass of its own."""
    packed = pack([Row(context.encode(base, prompt), (reply,))], device=base.device)
    with torch.no_grad():
        return token_logprobs(base.states(packed), base.head, packed.target_N).sum().item()


def test_it_is_the_first_order_estimate_of_what_the_expected_reward_gains(tiny_base):
    groups = [[((5, 6, 7), 1.0), ((8,), 0.2)], [((7, 7), 0.0), ((3, 6, 2, 8), 0.5)]]
    found = promises(tiny_base, evidence_of(*groups), PARENT, CHILDREN)
    for child, promised in zip(CHILDREN, found, strict=True):
        by_hand = 0.0
        for problem, group in zip(PROBLEMS, groups, strict=False):
            mean = sum(reward for _, reward in group) / len(group)
            for reply, reward in group:
                new, old = (log_likelihood(tiny_base, c, problem.prompt, reply) for c in (child, PARENT))
                by_hand += (reward - mean) * max(-CLIP_NATS, min(CLIP_NATS, new - old)) / len(groups)
        assert promised == pytest.approx(by_hand, abs=1e-4)
    assert len({round(promised, 4) for promised in found}) == len(CHILDREN)
    assert promises(tiny_base, evidence_of(*groups), PARENT, [PARENT]) == [pytest.approx(0.0, abs=1e-5)]


def test_one_long_reply_does_not_speak_for_all(tiny_base):
    far = TaskContext(guidelines=("Something quite different. " * 20,))
    [promised] = promises(tiny_base, evidence_of([(tuple(range(3, 60)), 1.0), ((5,), 0.0)]), EMPTY, [far])
    assert abs(promised) <= CLIP_NATS


def test_replies_that_all_earned_the_same_say_nothing_and_of_many_the_extremes_are_kept():
    assert evidence_of([((1,), 0.5), ((2,), 0.5)], [((1,), 1.0)]).groups == ()
    [group] = evidence_of([((n,), n / 10) for n in (5, 1, 9, 3, 7, 2)]).groups
    assert len(group.rewards) == 2 * EXTREMES
    assert group.rewards == (0.1, 0.9)
    assert group.replies == ((1,), (9,))
    # The same reply twice is no more than once.
    [group] = evidence_of([((4,), 1.0), ((4,), 1.0), ((6,), 0.0)]).groups
    assert group.replies == ((6,), (4,))


def test_newer_replies_take_the_place_of_those_to_the_same_problem_and_the_oldest_problems_go():
    problems = [Problem(f"m{n}", f"More {n}", lambda reply: Verdict(reward=1.0)) for n in range(MOST_GROUPS + 2)]
    evidence = Evidence()
    for problem in problems:
        evidence = evidence.with_replies([replied(problem, (1,), 1.0), replied(problem, (2,), 0.0)])
    assert [group.prompt for group in evidence.groups] == [problem.prompt for problem in problems[2:]]
    evidence = evidence.with_replies([replied(problems[5], (3,), 1.0), replied(problems[5], (4,), 0.0)])
    assert evidence.groups[-1].prompt == problems[5].prompt
    assert evidence.groups[-1].replies == ((4,), (3,))
    assert len(evidence.groups) == MOST_GROUPS


def test_of_several_children_the_one_that_promises_most_is_tried():
    """One exemplar of many helps; to find it blindly takes more tries than there are."""
    material = material_of(*((f"q{n}", 1.0, "") for n in range(12)))
    right = "q7"

    def reward(context):
        return 0.9 if any(shown.prompt == right for shown in context.exemplars) else 0.1

    def promise(parent, children):
        return [reward(child) - reward(parent) for child in children]

    tries = 3 * len(PROBLEMS)
    blind = [evolved(reward, material=material, budget=tries, seed=seed)[0] for seed in range(10)]
    told = [evolved(reward, material=material, budget=tries, seed=seed, promise=promise)[0] for seed in range(10)]
    found = [sum(e.rewards[0] > 0.5 for e in runs) for runs in (blind, told)]
    assert found[1] > found[0] + 2
    assert all(e.samples <= tries + len(PROBLEMS) for e in told)
