"""Rendezvous hashing of users over replicas."""

from collections import Counter

from service.domain.affinity import affinity_of, ranked

NODES = [f"http://vllm-{n}:8000" for n in range(5)]
USERS = [affinity_of(tenant="acme", user=f"user-{n}") for n in range(5000)]


def first(user: str, nodes: list[str]) -> str:
    return nodes[ranked(user, nodes)[0]]


def test_the_order_is_a_permutation_and_depends_on_names_alone() -> None:
    order = [NODES[n] for n in ranked(USERS[0], NODES)]
    assert sorted(order) == NODES
    backwards = NODES[::-1]
    assert [backwards[n] for n in ranked(USERS[0], backwards)] == order


def test_users_are_spread_evenly_over_the_first_and_the_second_place() -> None:
    for place in (0, 1):
        counts = Counter(ranked(user, NODES)[place] for user in USERS)
        # 1,000 each with a standard deviation of 28.
        assert all(850 < counts[n] < 1150 for n in range(len(NODES))), counts


def test_a_node_that_leaves_moves_only_its_own_users_each_to_the_next_in_order() -> None:
    left = NODES[:2] + NODES[3:]
    for user in USERS[:1000]:
        order = [NODES[n] for n in ranked(user, NODES)]
        assert first(user, left) == (order[1] if order[0] == NODES[2] else order[0])


def test_a_node_that_joins_takes_about_its_share_and_moves_nobody_between_the_others() -> None:
    joined = [*NODES, "http://vllm-5:8000"]
    moved = [user for user in USERS if first(user, joined) != first(user, NODES)]
    assert {first(user, joined) for user in moved} == {joined[-1]}
    assert 650 < len(moved) < 1020


def test_the_same_user_id_of_another_tenant_is_somebody_else() -> None:
    assert affinity_of(tenant="acme", user="alice") != affinity_of(tenant="globex", user="alice")
    assert affinity_of(tenant="a\0b", user="c") != affinity_of(tenant="a", user="bc")
