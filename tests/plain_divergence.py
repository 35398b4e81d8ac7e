"""KL as transformers and peft alone compute it: one sequence at a time, nothing packed, cached or cut into chunks."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from workers.consolidation.rows import Row


def load_plain(model: Path, adapter: Path | None = None) -> Any:
    """The model in float32, with the adapter in `adapter` if given, as anybody loads it."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return (plain if adapter is None else PeftModel.from_pretrained(plain, adapter)).eval()


def kl_nats(plain: Any, adapted: Any, row: Row) -> float:
    """KL(plain || adapted) of a row's first reply, the mean over its tokens, in float64."""
    ids_1_T = torch.tensor([row.prompt + row.replies[0]])
    at = slice(len(row.prompt) - 1, ids_1_T.shape[1] - 1)
    with torch.no_grad():
        base_N_V = plain(input_ids=ids_1_T).logits[0, at].double().log_softmax(dim=1)
        ours_N_V = adapted(input_ids=ids_1_T).logits[0, at].double().log_softmax(dim=1)
    return float((base_N_V.exp() * (base_N_V - ours_N_V)).sum(dim=1).mean())
