"""The calls of a client: an OpenAI-compatible chat endpoint, and the service's own beside it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

Messages = list[dict[str, str]]

MAX_TOKENS = 64
TRIES = 5
REQUEST_SECONDS = 600.0


@dataclass(frozen=True)
class Reply:
    """One chat completion, and what it took."""

    id: str
    text: str
    prompt_tokens: int
    cached_tokens: int
    context_tokens: int
    seconds: float
    adapter: str
    member: str

    def fields(self) -> dict[str, Any]:
        return asdict(self)


class Refused(Exception):
    """An endpoint answered with an error."""


class Endpoint:
    """Any OpenAI-compatible server; `base` is what comes before `/chat/completions`."""

    def __init__(self, base: str, *, model: str, key: str = "") -> None:
        self.model = model
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=f"{base.rstrip('/')}/", headers=headers, timeout=REQUEST_SECONDS)

    async def chat(
        self,
        messages: Messages,
        *,
        user: str | None = None,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
        personalization: dict[str, bool] | None = None,
    ) -> Reply:
        """A reply, greedy by default.

        Raises:
            Refused: there is none.
        """
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        body |= {"max_tokens": max_tokens, "temperature": temperature}
        if user is not None:
            body["user"] = user
        if seed is not None:
            body["seed"] = seed
        if personalization is not None:
            body["personalization"] = personalization
        began = time.perf_counter()
        response = await self.post("chat/completions", body)
        seconds = time.perf_counter() - began
        found, headers = response.json(), response.headers
        usage = found.get("usage") or {}
        return Reply(
            id=found["id"],
            text=found["choices"][0]["message"]["content"] or "",
            prompt_tokens=usage.get("prompt_tokens", 0),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            context_tokens=int(headers.get("x-fastslow-context-tokens", 0)),
            seconds=seconds,
            adapter=headers.get("x-fastslow-adapter", ""),
            member=headers.get("x-fastslow-context-member", ""),
        )

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        """Tried again while the server is away or overloaded and, as OpenAI's client does, after 408: this process may have stood still."""
        return await self.request("POST", path, json=body, headers=headers)

    async def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                response = await self._http.request(method, path, **arguments)
            except httpx.TransportError:
                if last:
                    raise
                await asyncio.sleep(2**attempt)
                continue
            if response.status_code in (408, 429, 503) and not last:
                await asyncio.sleep(float(response.headers.get("retry-after", 2**attempt)))
                continue
            if response.is_error:
                raise Refused(f"{method} {path}: {response.status_code} {response.text[:300]}")
            return response
        raise AssertionError("unreachable")

    async def close(self) -> None:
        await self._http.aclose()


class Service(Endpoint):
    """The running service, by its public interface alone."""

    def __init__(self, url: str, *, model: str, client_key: str, admin_key: str) -> None:
        super().__init__(f"{url.rstrip('/')}/v1", model=model, key=client_key)
        self._admin = {"Authorization": f"Bearer {admin_key}"}

    async def feedback(self, user: str, body: dict[str, Any], *, key: str) -> None:
        """Give feedback; the key makes it harmless to give the same again."""
        await self.post("feedback", body, **{"X-User-ID": user, "Idempotency-Key": key})

    async def optimizing(self, user: str) -> bool:
        """Whether the user's context is still being worked on in the background."""
        response = await self.request("GET", f"users/{user}/context", headers={"X-User-ID": user})
        return bool(response.json().get("optimizing", False))

    async def adapters(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.request("GET", "admin/adapters", headers=self._admin)).json()["data"]
        return found

    async def consolidate(self, scopes: Sequence[str]) -> dict[str, str]:
        """Start training the scopes' adapters side by side; each scope's job. One that is being trained already keeps its job."""
        started = await self.post("admin/consolidations/batch", {"scopes": list(scopes)}, **self._admin)
        return {job["scope"]: job["id"] for job in started.json()["data"]}

    async def job(self, job_id: str) -> dict[str, Any]:
        """A consolidation: how far it is, or how it ended."""
        found: dict[str, Any] = (
            await self.request("GET", f"admin/consolidations/{job_id}", headers=self._admin)
        ).json()
        return found

    async def chat_budget(self, scope: str, nats: float | None) -> None:
        """Set the scope's KL budget on chat anchors, nats per token; None leaves it to the default again."""
        body = {"kl_chat_nats": nats}
        await self.request("PUT", f"admin/scopes/{scope}/budgets", json=body, headers=self._admin)

    async def roll_back(self, scope: str) -> None:
        await self.post(f"admin/scopes/{scope}/rollback", {"reason": "bench-learning"}, **self._admin)
