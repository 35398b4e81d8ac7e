"""Tasks whose rewards a program checks: the same problems for the same seed, splits apart, verdicts that say what is wrong."""

import itertools
import subprocess
import sys

import pytest
from pydantic import ValidationError

from service.errors import InvalidRequest, VerifiersMissing
from service.verifiers import Verdict, task, task_names
from service.verifiers.gym import answer_of
from service.verifiers.house import HOUSES, Question, no_answer, questions
from service.verifiers.packages import imported, without_entry
from service.verifiers.star_graph import judge

ONE_OF_EACH = ("star-graph-2x3", "gym:letter_counting", "gym-easy:spell_backward", "norms:memo", "norms-told:brief")


@pytest.mark.parametrize("name", task_names())
def test_the_same_seed_gives_the_same_problems_and_another_one_others(name: str) -> None:
    first, again, other = (
        [(p.id, p.prompt) for p in task(name).problems("train", count=12, seed=seed)] for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert len(first) == len({prompt for _, prompt in first}) == len({name for name, _ in first})


@pytest.mark.parametrize("name", task_names())
def test_no_prompt_to_train_with_is_one_to_test_with(name: str) -> None:
    train = {p.prompt for seed in range(3) for p in task(name).problems("train", count=60, seed=seed)}
    test = {p.prompt for seed in range(3) for p in task(name).problems("test", count=30, seed=seed)}
    assert train
    assert test
    assert not train & test


def test_neighbouring_seeds_share_no_run_of_generated_problems() -> None:
    one, next_one = (
        {p.prompt for p in task("gym:chain_sum").problems("train", count=50, seed=seed)} for seed in (1, 2)
    )
    assert len(one & next_one) < 5


def test_a_task_of_few_prompts_repeats_them_only_after_all_were_given() -> None:
    found = task("norms:brief").problems("test", count=45, seed=0)
    few = len({p.id for p in found})
    assert few == len(questions()) // 5
    assert len({p.id for p in found[:few]}) == few
    assert len({p.prompt for p in task("gym-easy:chain_sum").problems("test", count=500, seed=0)}) < 500


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("reply", ["", " ", "I don't know.", "12->34", "<answer></answer>", "{" * 5000, "é漢 \x00"])
def test_no_reply_breaks_a_check_and_every_reward_below_one_is_explained(name: str, reply: str) -> None:
    for problem in task(name).problems("train", count=3, seed=0):
        verdict = problem.check(reply)
        assert 0 <= verdict.reward <= 1
        assert verdict.reward == 1 or verdict.feedback


def test_a_reward_below_one_without_a_word_is_no_verdict() -> None:
    assert Verdict(reward=1.0, feedback="").reward == 1
    with pytest.raises(ValidationError, match="needs feedback"):
        Verdict(reward=0.5, feedback=" ")


@pytest.mark.parametrize("name", ["chess", "gym:", "gym-easy:maze", "norms:nobody", "norms:", "star-graph-axb", ""])
def test_an_unknown_name_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(InvalidRequest, match="norms:brief-json") as raised:
        task(name)
    assert (raised.value.param, raised.value.code) == ("task", "unknown_task")


@pytest.mark.parametrize("name", ["star-graph-1x3", "star-graph-2x0", "star-graph-20x20"])
def test_a_star_that_can_not_be_drawn_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="can't be drawn"):
        task(name)


@pytest.mark.parametrize(("name", "why"), [("gym:nothing", "none of reasoning-gym's"), ("gym:n_queens", "as Python")])
def test_a_generator_that_is_unknown_or_runs_replies_as_python_makes_no_problem(name: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        task(name).problems("train", count=1, seed=0)


PATH, EDGES = [10, 11, 12], [(10, 11), (11, 12), (10, 21), (21, 22)]


@pytest.mark.parametrize(
    ("reply", "reward", "said"),
    [
        ("10->11->12", 1.0, "Right"),
        ("First I look at 10 -> 21. The path is 10 -> 11 -> 12.", 1.0, "Right"),
        ("10->21->22", 0.0, "step 1 goes to 21, which is on another arm than 12"),
        ("10->11->22", 0.0, "step 2 goes from 11 to 22, and no edge does"),
        ("10->11", 0.0, "stops at 11 before it reaches 12"),
        ("11->12", 0.0, "must begin at 10, not at 11"),
        ("10->11->12 or 10->21->22", 0.0, "another arm"),
        ("10, 11, 12", 0.0, "holds no path"),
    ],
)
def test_a_wrong_path_is_told_where_it_goes_wrong(reply: str, reward: float, said: str) -> None:
    verdict = judge(reply, path=PATH, edges=EDGES)
    assert verdict.reward == reward
    assert said in verdict.feedback
    assert reward == 1 or "The path is 10->11->12" in verdict.feedback


def test_the_path_of_a_drawn_star_is_among_its_edges_and_right() -> None:
    for problem in task("star-graph-3x3").problems("train", count=20, seed=1):
        right = problem.check("?").feedback.split("The path is ")[1].rstrip(".")
        assert problem.check(right).reward == 1
        nodes = right.split("->")
        assert len(nodes) == 4
        assert all(f"{a}->{b}" in problem.prompt for a, b in itertools.pairwise(nodes))


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<answer>7</answer>", "7"),
        ("<answer>5</answer> no, <Answer> 7 </Answer>", "7"),
        ("Let me think: <answer>7", "7"),
        ("I add.\nThe answer is 7.", "7"),
        ("1 + 6 = 7", "7"),
        ("**Answer:** 7", "7"),
        ("gab", "gab"),
        ("", ""),
    ],
)
def test_an_answer_is_found_in_tags_or_on_the_last_line(reply: str, answer: str) -> None:
    assert answer_of(reply) == answer


def test_generated_problems_are_scored_by_their_own_scorer_with_the_expected_answer_in_words() -> None:
    [problem] = task("gym-easy:spell_backward").problems("train", count=1, seed=5)
    word = problem.prompt.split("nus): ")[1].split("\n")[0]
    assert problem.check(f"<answer>{word[::-1]}</answer>").reward == 1
    wrong = problem.check(f"<answer>{word}</answer>")
    assert wrong.reward < 1
    assert f"expected '{word[::-1]}'" in wrong.feedback
    assert "The reply holds no answer" in problem.check("").feedback


def test_a_scorer_that_chokes_on_a_reply_gives_it_nothing() -> None:
    [problem] = task("gym:prime_factorization").problems("train", count=1, seed=0)
    assert problem.check("<answer>what?</answer>").reward == 0


FRANCE = Question("What is the capital of France?", ("paris",))


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("Paris", "1 words"),
        ("The answer is simple.", "nothing about the question"),
        ("It is comparison that counts.", "nothing about the question"),
        ("It is Paris, it is Paris, it is Paris, it is Paris, it is Paris,", "say each thing once"),
    ],
)
def test_a_reply_that_does_not_answer_gets_nothing_whatever_its_form(reply: str, why: str) -> None:
    assert why in str(no_answer(reply, FRANCE))


def test_a_reply_that_answers_is_rewarded_for_its_share_of_the_norms() -> None:
    assert no_answer("The capital is Paris.", FRANCE) is None
    [problem] = [p for p in task("norms:memo").problems("train", count=80, seed=0) if "capital of Japan" in p.prompt]
    assert problem.check("<<Japan>>\n- Tokyo is the capital.\n- It lies on Honshu.").reward == 1
    half = problem.check("Tokyo, the capital.")
    assert half.reward == 0.25
    assert "Not held: No commas." in half.feedback
    assert "Held: At most 60 words." in half.feedback
    assert problem.check("<<Nothing>>\n- Apples are red.\n- Pears are not.").reward == 0


def test_every_house_has_a_reply_that_holds_all_its_norms() -> None:
    held = {
        "brief": "The capital of France is Paris.",
        "lowercase": "the capital of france is paris.",
        "short-quoted": '"The capital of France is Paris."',
        "sign-off": "The capital of France is Paris. Cheers!",
        "greeting": "Good question. The capital of France is Paris.",
        "no-commas": "The capital of France is the city of Paris.",
        "bullets": "- Paris\n- is the capital\n- of France",
        "memo": "<<France>>\n- Its capital is Paris.\n- It lies on the Seine.",
        "brief-json": '{"answer": "Paris"}',
    }
    assert held.keys() == HOUSES.keys()
    [untold] = [q for q in questions() if "capital of France" in q.ask]
    for name, reply in held.items():
        ours = [p for p in task(f"norms:{name}").problems("test", count=20, seed=0) if p.prompt == untold.ask]
        ours += [p for p in task(f"norms:{name}").problems("train", count=80, seed=0) if p.prompt == untold.ask]
        assert ours[0].check(reply).reward == 1, ours[0].check(reply)


def test_told_norms_stand_in_the_prompt_and_untold_ones_do_not() -> None:
    [told] = task("norms-told:lowercase").problems("train", count=1, seed=0)
    [untold] = task("norms:lowercase").problems("train", count=1, seed=0)
    assert "Lowercase letters only." in told.prompt
    assert "owercase" not in untold.prompt


def test_the_questions_are_many_and_differ() -> None:
    asked = [q.ask for q in questions()]
    assert len(asked) == len(set(asked)) >= 60
    assert all(q.topic for q in questions())


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    for need in (imported, without_entry):
        with pytest.raises(VerifiersMissing, match=r"fastslow\[verifiers\]"):
            need("no_such_package_of_verifiers")


def test_neither_the_registry_nor_its_problems_load_a_gpu_stack() -> None:
    code = (
        "import sys, service.verifiers as v\n"
        "early = [m for m in ('reasoning_gym', 'if_verifiable', 'nltk') if m in sys.modules]\n"
        f"for name in {ONE_OF_EACH!r}:\n"
        "    [p.check('<<Sky>> It is blue.') for p in v.task(name).problems('train', count=60, seed=0)]\n"
        "late = [m for m in ('reasoning_gym', 'if_verifiable', 'torch', 'transformers', 'datasets') if m in sys.modules]\n"
        "print('loaded', early, late)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines()[-1] == "loaded [] ['reasoning_gym', 'if_verifiable']"
