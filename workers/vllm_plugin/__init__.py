"""What vLLM loads of ours, through its entry points: adapters by name from the store, and a closed set of routes.

- `local_copy.py`  verifies an adapter version and copies it to this replica
- `resolver.py`    lets a request name an adapter version as its model (loaded in each of vLLM's processes)
- `guard.py`       which paths a replica answers, and to whom
- `eviction.py`    forgets an adapter without pulling files from under a running request
- `routes.py`      lists and evicts adapters over HTTP
"""
