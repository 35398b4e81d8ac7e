"""The tour of the README, on a stack that `make up` has started: one user teaches a style, it is consolidated, and rolled back.

.venv/bin/python -m tests.e2e.tour [--url http://127.0.0.1:8080] [--data-dir data]
"""

import argparse
import time
from pathlib import Path

import httpx
from openai import OpenAI

from service.keys import load_keys

MODEL = "smollm2-135m-instruct"
# One short sentence that ends with a fixed word: what a model of 135 million parameters can learn and an eye can check.
LESSONS = {
    "What is rain?": "Rain is water that falls from clouds. Cheers!",
    "What is a noun?": "A noun is a word for a person, place or thing. Cheers!",
    "How do plants eat?": "They make sugar from light, water and air. Cheers!",
    "What does a bank do?": "It keeps money safe and lends it out. Cheers!",
    "Why do birds sing?": "They sing to find mates and guard their home. Cheers!",
    "What is a river?": "A river is water that flows to the sea. Cheers!",
    "How does a boat float?": "It weighs less than the water that it moves. Cheers!",
    "What is bread made of?": "Bread is made of flour, water, salt and yeast. Cheers!",
    "Why is sleep good?": "Sleep lets the body and the mind recover. Cheers!",
    "What is a desert?": "A desert is a place with very little rain. Cheers!",
    "How do bees make honey?": "Bees dry the nectar of flowers in their hive. Cheers!",
    "What is the moon?": "The moon is a rock that circles the earth. Cheers!",
    "Why do we laugh?": "We laugh to show joy and to bond with others. Cheers!",
    "What is a map for?": "A map shows where places are. Cheers!",
    "How does a lock work?": "A key lifts pins so that the lock can turn. Cheers!",
    "What is a poem?": "A poem is words set in rhythm to stir feeling. Cheers!",
    "How do magnets work?": "They pull on iron without touching it. Cheers!",
    "What is a volcano?": "A volcano is a mountain that lets out lava. Cheers!",
    "Why do leaves fall?": "Trees drop leaves to save water in winter. Cheers!",
    "What does a judge do?": "A judge decides what the law says. Cheers!",
}
ASKED = ("Why is the sky blue?", "What is a verb?", "Why do cats purr?")


class Tour:
    """One user and one admin."""

    def __init__(self, url: str, data_dir: Path, user: str) -> None:
        keys = load_keys(data_dir / "keys.json")
        who = {"X-User-ID": user}
        self.user = user
        self.openai = OpenAI(base_url=f"{url}/v1", api_key=keys.first("client"), default_headers=who)
        self.http = httpx.Client(
            base_url=url, headers=who | {"Authorization": f"Bearer {keys.first('client')}"}, timeout=60
        )
        self.admin = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {keys.first('admin')}"}, timeout=60)

    def ask(self, question: str, *, show: bool = True) -> str:
        """A greedy reply; the completion's id."""
        raw = self.openai.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=40
        )
        completion = raw.parse()
        if show:
            served = (
                f"{raw.headers['x-fastslow-adapter']}, context of {raw.headers['x-fastslow-context-tokens']} tokens"
            )
            print(f"  {question}\n    -> {completion.choices[0].message.content}\n       ({served})")
        return completion.id

    def feedback(self, interaction: str, **signals: object) -> None:
        self.http.post("/v1/feedback", json={"interaction_id": interaction, **signals}).raise_for_status()

    def consolidate(self) -> None:
        """Start one, show it, and wait for its end."""
        started = self.admin.post("/v1/admin/consolidations", json={"scope": f"user:{self.user}"})
        started.raise_for_status()
        shown = ""
        began = time.monotonic()
        while True:
            job = self.admin.get(f"/v1/admin/consolidations/{started.json()['id']}").json()
            if job["stage"] != shown:
                shown = job["stage"]
                print(f"  {time.monotonic() - began:4.0f} s  {job['state']}, {shown}")
            if job["state"] in ("promoted", "rejected", "failed"):
                break
            time.sleep(1)
        for reason in job["reasons"]:
            print(f"  because {reason}")
        report = job["report"]
        if report:
            text, chat, margins = report["kl_text"], report["kl_chat"], report["margins"]
            print(
                f"  trained on {report['train_examples']}, judged on {report['heldout_examples']} that training never saw"
            )
            for name, kl in (("plain text", text), ("chat", chat)):
                print(
                    f"  KL from the base, {name}: {kl['mean_nats']:.4f} nats per token, at most {kl['upper95_nats']:.4f} "
                    f"(95 %), budget {kl['budget_nats']:g}"
                )
            print(f"  held-out margin: base {margins['base']:.2f}, candidate {margins['candidate']:.2f} nats per token")
            print(
                f"  context: {report['context_tokens_before']} tokens before, {report['context_tokens_after']} after; "
                f"{report['peak_memory_bytes'] / 2**30:.1f} GiB at most"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--user", default=f"ada-{int(time.time())}", help="a new user by default")
    given = parser.parse_args()
    tour = Tour(given.url, given.data_dir, given.user)

    print("Before any feedback:")
    for question in ASKED:
        tour.ask(question)
    first, *others = LESSONS
    tour.feedback(
        tour.ask(first, show=False), comment="One short sentence. End with Cheers!", correction=LESSONS[first]
    )
    for question in others[:3]:
        tour.feedback(tour.ask(question, show=False), correction=LESSONS[question])
    print("\nAfter one comment and four corrections:")
    for question in ASKED:
        tour.ask(question)
    for question in others[3:]:
        tour.feedback(tour.ask(question, show=False), correction=LESSONS[question])
    print("\nAfter twenty corrections, a consolidation:")
    tour.consolidate()
    print("\nServed by it:")
    for question in ASKED:
        tour.ask(question)
    rolled = tour.admin.post(f"/v1/admin/scopes/user:{given.user}/rollback", json={"reason": "end of the tour"})
    print(f"\nRolled back: {rolled.json().get('to_version') or rolled.json()['error']['message']}")
    tour.ask(ASKED[0])


if __name__ == "__main__":
    main()
