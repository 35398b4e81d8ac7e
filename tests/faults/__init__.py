"""Breaks one thing at a time under a steady load of chats and feedback, and counts what was acknowledged and what is there afterwards.

python -m tests.faults [NAME ...]        all faults, or these; the last line is JSON

- `registry.py`   what a fault is; each is a generator in one of the modules of `kinds/`
- `stack.py`      what is broken: two gateways, two upstreams, Valkey, a worker, a scheduler, all under the supervisor of `fastslow up`
- `front.py` `proxy.py`   what stands before the gateways; what can delay, cut and half-close connections
- `upstream.py`   answers like vLLM, with what it was asked
- `load.py` `client.py`   users who chat and tell what they think of it, with OpenAI's client
- `checks.py` `records.py`   what must not happen, and how long until all is well: pure
- `trial.py` `report.py`  one fault from begin to end; all of them as a table and a line
"""
