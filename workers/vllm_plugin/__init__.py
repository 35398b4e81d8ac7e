"""What vLLM loads of ours, through its entry points: adapters by name from the store, scores of replies, and a closed set of routes.

- `resolver.py`    lets a request name an adapter version as its model (loaded in each of vLLM's processes)
- `held_copies.py` the files that its engine may read at any time
- `guard.py`       which paths a replica answers, and to whom
- `eviction.py`    forgets an adapter without pulling files from under a running request
- `scoring.py`     how likely replies are, exactly, whatever the prefix cache holds
- `engine_runs.py` its runs over sequences, by vLLM's engine
- `score_route.py` scores the replies of a request beside chats
- `cpu_platform.py` and `adapter_rows.py` keep adapters off other requests' rows on the CPU, and make them fast there
- `routes.py`      the endpoint plugin: lists and evicts adapters, takes the requests for scores
"""
