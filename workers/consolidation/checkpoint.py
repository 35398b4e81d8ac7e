"""Checkpoints of training: a killed job goes on from the last one, and ends as if it had never been killed. So does one that could not be
ended because vLLM or Redis was away: its last one is of the end. They go when the job has ended.

One file a job, where whichever worker takes the job over finds it: in the folder that the store is, or shared through the store. It names
all that the rest of the run depends on; where that has changed meanwhile (new feedback, other settings), training starts anew.
"""

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from workers.adapter_store import AdapterStore
from workers.consolidation.adamw import SlotAdamW
from workers.consolidation.anchors import KINDS
from workers.consolidation.learner import Learner, Progress
from workers.consolidation.lora import LoraStack

log = logging.getLogger(__name__)

SUFFIX = ".checkpoint"


class Checkpoints:
    """The checkpoints of jobs in one folder.

    Args:
        folder: where they are written; None keeps none.
        elsewhere: how other nodes get them; None where only this one does.
    """

    def __init__(self, folder: Path | None, *, elsewhere: AdapterStore | None = None) -> None:
        self._folder = folder
        self._elsewhere = elsewhere

    def path(self, job: str) -> Path | None:
        return self._folder / f".{job}{SUFFIX}" if self._folder else None

    def save(self, learner: Learner, stack: LoraStack, optimizer: SlotAdamW) -> None:
        """Write a learner's state, whole or not at all.

        Raises:
            OSError, SafetensorError: the disk is full, say.
        """
        path = self.path(learner.job)
        if path is None:
            return
        slot = learner.slot
        tensors = {
            "weights": stack.weights_U_N.detach()[slot],
            "first": optimizer.first_U_N[slot],
            "second": optimizer.second_U_N[slot],
        }
        metadata = {"of": _depends(learner, stack), "progress": json.dumps(dataclasses.asdict(learner.progress))}
        descriptor, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
        os.close(descriptor)
        try:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        if self._elsewhere is not None:
            self._elsewhere.share(path)

    def resume(self, learner: Learner, stack: LoraStack, optimizer: SlotAdamW) -> None:
        """Set a learner to its last checkpoint, if there is one of this very training."""
        path = self.path(learner.job)
        if path is not None and self._elsewhere is not None:
            self._elsewhere.shared(path)
        if path is None or not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                if metadata["of"] != _depends(learner, stack):
                    log.info("job %s: its data have changed since its checkpoint, training starts anew", learner.job)
                    return
                tensors = {name: file.get_tensor(name) for name in ("weights", "first", "second")}
            learner.progress = Progress(**json.loads(metadata["progress"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("job %s: its checkpoint can't be read, training starts anew: %s", learner.job, error)
            return
        with torch.no_grad():
            stack.weights_U_N[learner.slot] = tensors["weights"].to(stack.weights_U_N.device)
            optimizer.first_U_N[learner.slot] = tensors["first"].to(stack.weights_U_N.device)
            optimizer.second_U_N[learner.slot] = tensors["second"].to(stack.weights_U_N.device)
        log.info("job %s: training goes on after step %d", learner.job, learner.progress.step)

    def remove(self, job: str) -> None:
        """Remove a job's checkpoint here and where others get it. One that can't be removed is an orphan after a day."""
        path = self.path(job)
        if path is None:
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s stays for a day: %s", path, error)
        if self._elsewhere is not None:
            self._elsewhere.unshare(path)


def _depends(learner: Learner, stack: LoraStack) -> str:
    """Digest of what a training depends on, but for the code."""
    settings = learner.settings
    parts = [
        [[row.prompt, row.replies] for row in learner.rows()],
        [[p.example.kind, p.example.rating, p.example.comment] for p in learner.examples],
        # What the context and the norms teach, they teach by what is drawn under these.
        [[row and [row.prompt, row.replies] for row in (p.full_context, p.with_comment)] for p in learner.examples],
        [norm.model_dump(mode="json") for norm in learner.norms],
        [[kind, [[a.row.prompt, a.row.replies] for a in learner.anchors.of(kind, "steer")]] for kind in KINDS],
        stack.base.sha256,
        learner.plan,
        learner.budgets,
        learner.start,
        [settings.learning_rate, settings.train_seed, settings.train_token_limit],
        [stack.shape.rank, stack.shape.alpha, stack.shape.targets],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
