"""The frozen base model, loaded once per worker process: tokens in, hidden states out.

While a consolidation runs, LoRA layers are put into this very model (`lora.py`), so what is computed here is computed with the
adapter that is switched on at the time.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from service.domain.feedback import Message
from service.errors import JobFailed
from service.settings import Settings
from service.tokens import TokenizerUnavailable, Tokens, load_tokens
from workers.consolidation.rows import Packed

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
FILES = (*WEIGHT_FILES, "*.json", "*.jinja", "tokenizer*", "*.model")


class TemplateRefused(JobFailed):
    """The chat template does not take a conversation."""


@dataclass(frozen=True)
class Base:
    """A causal language model that is never trained itself, and its tokenizer."""

    model: Any
    tokenizer: Any
    tokens: Tokens
    name: str
    """The served model's name."""
    sha256: str
    """Hash of the weight files."""
    device: torch.device

    @property
    def head(self) -> Tensor:
        """The output embedding, shape (V, D): logits are states @ head^T."""
        return self.model.get_output_embeddings().weight

    def states(self, packed: Packed) -> Tensor:
        """Last hidden states that predict the reply tokens, shape (N, D)."""
        decoder = getattr(self.model, self.model.base_model_prefix)
        output = decoder(
            input_ids=packed.tokens_B_T,
            position_ids=packed.positions_B_T,
            attention_mask=packed.mask_B_1_T_T,
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1)[packed.at_N]

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt's tokens by the chat template, up to where the reply begins. Users' control tokens are neutralized.

        Raises:
            TemplateRefused: the template does not take the conversation.
        """
        turns = [{**m.sent(), "content": self.tokens.neutralize(m.content or "")} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2 templates raise whatever their author chose
            raise TemplateRefused(f"the chat template of {self.name} refuses a conversation: {error}") from error
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_reply(self, text: str, *, ended: bool) -> tuple[int, ...]:
        """A reply's tokens; with the end of turn if the reply `ended` by itself."""
        ids = tuple(self.tokenizer(self.tokens.neutralize(text), add_special_tokens=False)["input_ids"])
        return (*ids, self.tokenizer.eos_token_id) if ended else ids

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Plain text, outside the chat template."""
        return tuple(self.tokenizer(text)["input_ids"])


def load_base(settings: Settings) -> Base:
    """Load the base model: float32 on the CPU, bfloat16 on CUDA.

    Raises:
        JobFailed: it can't be found or loaded, or its logits are not its last state times its head.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = _device(settings.worker_device)
    folder = _folder(settings.model_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, attn_implementation="sdpa"
        )
        tokens = load_tokens(str(folder))
        sha256 = weights_sha256(folder)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, TokenizerUnavailable) as error:
        raise JobFailed(f"the base model at {folder} can't be loaded: {_first_line(error)}") from error
    model.requires_grad_(False).eval().to(device)
    base = Base(model=model, tokenizer=tokenizer, tokens=tokens, name=settings.model_name, sha256=sha256, device=device)
    check_head(base)
    return base


def check_head(base: Base) -> None:
    """Some families scale or cap their logits after the head; scoring here would be wrong for them.

    Raises:
        JobFailed: this model is of such a family.
    """
    with torch.inference_mode():
        ids = torch.arange(4, device=base.device)[None]
        expected = base.model(input_ids=ids, use_cache=False).logits.float()
        states = getattr(base.model, base.model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
        difference = ((states @ base.head.T).float() - expected).abs().max().item()
    if difference > 1e-2:
        raise JobFailed(
            f"{base.name} changes its logits after the head (by {difference:.3g}); it can't be trained here"
        )


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the weight files' names and contents, in the order of their names.

    Raises:
        JobFailed: there are none.
    """
    files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
    if not files:
        raise JobFailed(f"the base model at {folder} has no safetensors file")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise JobFailed("FASTSLOW_WORKER_DEVICE is cuda, but this machine has no CUDA device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _folder(path: str) -> Path:
    """The model's local folder; a hub id is fetched into the hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise JobFailed(f"there is no base model at {path}: set FASTSLOW_MODEL to its folder or to a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(FILES)))
    except Exception as error:  # the hub's errors share no base class with those of the network below it
        raise JobFailed(
            f"the base model {path} is no folder and can't be fetched as a hub id: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
