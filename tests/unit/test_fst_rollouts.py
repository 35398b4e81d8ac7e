"""Replies of the model in training: as it would score them itself, whatever else is in the batch."""

import pytest
import torch

from service.verifiers import Problem, Verdict
from tests.fst_tasks import find, roller
from workers.consolidation.rows import pack, token_logprobs
from workers.fst.contexts import EMPTY, Shown, TaskContext
from workers.fst.rollouts import Asked, Sampling, roll_groups, rows_of

CONTEXT = TaskContext(guidelines=("Be brief.",), exemplars=(Shown(prompt="Ask 1", reply="eee"),))


def words(new_tokens, **changes):
    """A random model hardly ever ends a reply."""
    return Sampling(new_tokens, **{"count_cut_off": True, **changes})


@pytest.fixture
def asked():
    problems = find("say-e").problems("train", count=4, seed=0)
    return [Asked(problem, CONTEXT if n % 2 else EMPTY) for n, problem in enumerate(problems)]


def test_old_log_probabilities_are_those_that_training_sees(tiny_base, asked):
    rollouts = roller(tiny_base).roll(asked, words(12), samples=3, seed="s")
    packed = pack(rows_of(rollouts), device=tiny_base.device)
    with torch.no_grad():
        logprobs_N = token_logprobs(tiny_base.states(packed), tiny_base.head, packed.target_N)
    old_N = torch.tensor([value for r in rollouts for value in r.logprobs])
    assert torch.allclose(logprobs_N, old_N, atol=1e-4)


def test_a_reply_does_not_depend_on_the_rest_of_the_batch(tiny_base, asked):
    together = roller(tiny_base).roll(asked, words(12), samples=2, seed="s")
    alone = [reply for one in asked for reply in roller(tiny_base).roll([one], words(12), samples=2, seed="s")]
    assert [r.reply for r in together] == [r.reply for r in alone]
    assert [r.asked for r in together] == [one for one in asked for _ in range(2)]


def test_samples_differ_and_so_do_seeds(tiny_base, asked):
    first = roller(tiny_base).roll(asked[:1], words(12), samples=4, seed="s")
    assert len({r.reply for r in first}) == 4
    other = roller(tiny_base).roll(asked[:1], words(12), samples=4, seed="t")
    assert {r.reply for r in first}.isdisjoint(r.reply for r in other)
    twice = roller(tiny_base).roll(asked[:1] * 2, words(12), samples=1, seed="s")
    assert twice[0].reply != twice[1].reply


def test_a_reply_that_was_not_scored_has_no_reward(tiny_base):
    def check(reply: str) -> Verdict:
        raise AssertionError("nobody asked for a reward")

    [rollout] = roller(tiny_base).roll(
        [Asked(Problem("p", "Ask", check), EMPTY)], words(4, rewarded=False), samples=1, seed="s"
    )
    with pytest.raises(ValueError, match="not scored"):
        _ = rollout.reward


@pytest.mark.parametrize("population", [(EMPTY,), (EMPTY, CONTEXT), (CONTEXT,) * 4])
def test_each_context_gets_its_exact_share_of_every_group(tiny_base, population):
    problems = find("say-e").problems("train", count=3, seed=0)
    rollouts = roll_groups(roller(tiny_base), problems, population, words(6), rollouts=8, seed="s")
    each = 8 // len(population)
    wanted = [(problem.id, context) for problem in problems for context in population for _ in range(each)]
    assert [(r.asked.problem.id, r.asked.context) for r in rollouts] == wanted
    for n in range(0, len(rollouts), 8):
        assert len({r.reply for r in rollouts[n : n + 8]}) == 8


def test_replies_that_are_there_already_are_used_once_and_the_rest_is_drawn(tiny_base):
    problems = find("say-e").problems("train", count=2, seed=0)
    population = (EMPTY, CONTEXT)
    there = roller(tiny_base).roll(
        [Asked(problems[0], CONTEXT), Asked(problems[1], EMPTY)], words(6), samples=1, seed="e"
    )
    drawn = {(r.asked.problem.id, r.asked.context): r for r in there}
    # The first problem comes twice, as where an epoch ends and the next one begins.
    asked = [problems[0], problems[1], problems[0]]
    rollouts = roll_groups(roller(tiny_base), asked, population, words(6), rollouts=4, seed="s", drawn=drawn)
    assert drawn == {}
    assert [(r.asked.problem.id, r.asked.context) for r in rollouts] == [
        (problem.id, context) for problem in asked for context in population for _ in range(2)
    ]
    assert [n for n, r in enumerate(rollouts) if r in there] == [2, 4]
    assert len({(r.asked.problem.id, r.reply) for r in rollouts}) == len(rollouts)


def test_rollouts_that_can_t_be_shared_out_equally_are_refused(tiny_base):
    problems = find("say-e").problems("train", count=1, seed=0)
    with pytest.raises(ValueError, match="3 contexts"):
        roll_groups(roller(tiny_base), problems, (EMPTY,) * 3, words(6), rollouts=8, seed="s")


def test_replies_to_one_prompt_share_a_row(tiny_base, asked):
    rollouts = roller(tiny_base).roll(asked, words(5), samples=3, seed="s")
    rows = rows_of(rollouts)
    assert [len(row.replies) for row in rows] == [3, 3, 3, 3]
    assert [reply for row in rows for reply in row.replies] == [r.reply for r in rollouts]


def test_a_problem_is_never_shown_with_its_own_solution():
    texts = [message.content for message in CONTEXT.messages("Ask 1")]
    assert "eee" not in texts
    assert "eee" in [message.content for message in CONTEXT.messages("Ask 2")]


def test_a_reply_that_does_not_end_earns_nothing_unless_it_is_said_to(tiny_base, asked):
    end = tiny_base.tokenizer.eos_token_id
    cut = roller(tiny_base).roll(asked, words(48, count_cut_off=False), samples=24, seed="s")
    counted = roller(tiny_base).roll(asked, words(48), samples=24, seed="s")
    assert [r.reply for r in cut] == [r.reply for r in counted]
    for rollout, same in zip(cut, counted, strict=True):
        if rollout.reply[-1] == end:
            assert rollout.verdict == same.verdict
        else:
            assert rollout.reward == 0.0
            assert "did not end within 48 tokens" in rollout.verdict.feedback
    assert {r.reply[-1] == end for r in cut} == {True, False}
