"""What is printed once a stack is ready: where it is, the keys, and three calls to copy."""

import json

from service.keys import Keys
from service.settings import Settings
from service.stack.children import address

QUESTION = "What is the capital of France?"
WANTED = "Paris. Ask me anything else!"


def welcome(settings: Settings, keys: Keys) -> str:
    """The text, for a POSIX shell with curl."""
    url, key = address(settings), keys.first("client")
    head = f"curl -s {url}"
    who = f"-H 'Authorization: Bearer {key}' -H 'X-User-ID: ada'"
    body = json.dumps({"model": settings.model_name, "messages": [{"role": "user", "content": QUESTION}]})
    # The id is the reply's, so the body can't be all in single quotes.
    feedback = json.dumps({"interaction_id": "ID", "correction": WANTED})
    before, after = feedback.split("ID")
    send = "-H 'Content-Type: application/json' -d"
    find_id = "$(printf %s \"$REPLY\" | grep -o 'chatcmpl-[0-9a-f]*' | head -n 1)"
    return f"""
Fastslow is ready at {url}/v1
  API key    {key}
  admin key  {keys.first("admin")}
  data, keys and logs are in {settings.data_dir.absolute()}

1. Chat as the user ada (or point any OpenAI client at the URL above, with the API key and the header X-User-ID):
REPLY=$({head}/v1/chat/completions {who} {send} '{body}'); printf '%s\\n' "$REPLY"

2. Say what the reply should have been:
{head}/v1/feedback {who} {send} '{before}'"{find_id}"'{after}'; echo

3. See what Fastslow has learnt of her, and chat again:
{head}/v1/users/ada/context {who}; echo

Ctrl-C stops everything."""
