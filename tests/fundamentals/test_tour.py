"""A newcomer's tour: one user, one gateway, each capability once. vLLM is a small fake here, all else is real."""

import httpx

from tests.fakes import MODEL, FakeVllm

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "What is a noun?"}]}


async def test_a_chat_is_an_openai_completion_that_says_what_served_it(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT)

    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "Reply 1"
    assert response.headers["x-fastslow-adapter"] == "base"
    assert response.headers["x-fastslow-context-revision"] == "0"


async def test_feedback_changes_the_very_next_chat(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    completion = (await client.post("/v1/chat/completions", json=CHAT)).json()

    feedback = {
        "interaction_id": completion["id"],
        "comment": "Answer in one sentence.",
        "correction": "A naming word.",
    }
    receipt = (await client.post("/v1/feedback", json=feedback)).json()
    after = await client.post("/v1/chat/completions", json=CHAT)

    assert receipt["context_revision"] == 1
    assert after.headers["x-fastslow-context-revision"] == "1"
    system, prompt, wanted, question = vllm.last["messages"]
    assert "Answer in one sentence." in system["content"]
    assert (prompt["content"], wanted["content"]) == ("What is a noun?", "A naming word.")
    assert question == {"role": "user", "content": "What is a noun?"}


async def test_what_one_user_taught_reaches_no_other(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    completion = (await client.post("/v1/chat/completions", json=CHAT)).json()
    await client.post("/v1/feedback", json={"interaction_id": completion["id"], "comment": "Rhyme always."})

    await client.post("/v1/chat/completions", json=CHAT, headers={"X-User-ID": "bob"})

    assert vllm.last["messages"] == CHAT["messages"]
    assert vllm.bodies[0]["cache_salt"] != vllm.last["cache_salt"]


async def test_the_context_can_be_read(client: httpx.AsyncClient) -> None:
    completion = (await client.post("/v1/chat/completions", json=CHAT)).json()
    await client.post("/v1/feedback", json={"interaction_id": completion["id"], "comment": "Be brief."})

    context = (await client.get("/v1/users/alice/context")).json()

    assert context["revision"] == 1
    [item] = context["items"]
    assert (item["kind"], item["text"], item["in_context"]) == ("guideline", "Be brief.", True)


async def test_retracting_a_comment_takes_it_out_of_the_context(client: httpx.AsyncClient, vllm: FakeVllm) -> None:
    completion = (await client.post("/v1/chat/completions", json=CHAT)).json()
    await client.post("/v1/feedback", json={"interaction_id": completion["id"], "comment": "Be brief."})

    await client.post("/v1/feedback", json={"interaction_id": completion["id"], "comment": None})
    await client.post("/v1/chat/completions", json=CHAT)

    assert vllm.last["messages"] == CHAT["messages"]
