"""Small adapter versions on disk, whose weights are any bytes, for what looks at hashes and never loads them; and random weights for
what does."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

WEIGHTS = b"weights of an adapter"
SCOPE = "0123456789ab"


def name_of(weights: bytes, *, number: int = 1, scope: str = SCOPE) -> str:
    return f"fs-{scope}-{number:04d}-{hashlib.sha256(weights).hexdigest()[:12]}"


NAME = name_of(WEIGHTS)


def write_version(store: Path, *, weights: bytes = WEIGHTS, number: int = 1, folder: Path | None = None) -> Path:
    """The three files of a version of the base model `base`, in `store` under its name, or in `folder`; that folder."""
    name = name_of(weights, number=number)
    target = folder or store / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "adapter_model.safetensors").write_bytes(weights)
    (target / "adapter_config.json").write_text("{}")
    content_sha256 = hashlib.sha256(weights).hexdigest()
    provenance = {"name": name, "base_model": "base", "content_sha256": content_sha256}
    provenance |= {"tenant": "acme", "scope": "user:alice", "job": f"job-{number}"}
    (target / "provenance.json").write_text(json.dumps(provenance))
    return target


def random_lora(config: Mapping[str, int], *, rank: int, seed: int, b_std: float = 0.05) -> dict[str, np.ndarray]:
    """A[rank, in] and B[out, rank] of every attention and MLP layer of a Llama model.

    Args:
        config: as its config.json.
        b_std: standard deviation of B's entries, by default strong enough to change a greedy reply.
    """
    random = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, values = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    widths = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, values),
        "self_attn.v_proj": (hidden, values),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (width_in, width_out) in widths.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = random.normal(0, 0.05, (rank, width_in)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = random.normal(0, b_std, (width_out, rank)).astype(np.float32)
    return tensors
