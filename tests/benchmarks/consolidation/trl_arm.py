"""TRL's DPOTrainer with peft, one user after the other, on the same pairs in the same order: its forward and backward, its optimizer loop.

It does less than the other arms: no anchors, so nothing bounds the drift, and no samples. It does more in two things: it runs a prompt
once for each of its replies, and computes the reference in every step (both are its defaults). Its activations are kept, as ours are,
where by default it would compute them again.
"""

import tempfile
from typing import Any

from service.settings import Settings
from tests.benchmarks.consolidation.material import learners
from tests.benchmarks.consolidation.ours import finished, lora_config
from tests.benchmarks.consolidation.turns import Order, Prepared, Turn, Watch, forget_peak
from workers.consolidation.base import Base
from workers.consolidation.learner import Learner
from workers.consolidation.rows import Row


class Trl:
    """`DPOTrainer`, made anew for each user, as one adapter at a time is trained with it."""

    def __init__(self, base: Base, settings: Settings, *, users: int) -> None:
        self._base, self._settings = base, settings
        self._learners = learners(base, settings, users=users)

    def prepare(self, users: int) -> Prepared:
        return Prepared()

    def turn(self, order: Order) -> Turn:
        turn, setup, watch = Turn(len(order.users), order.steps), Watch(self._base.device), Watch(self._base.device)
        forget_peak(self._base.device)
        for user in order.users:
            rows = rows_of(self._learners[user % len(self._learners)], order)
            with tempfile.TemporaryDirectory(prefix="fastslow-bench-") as folder:
                setup.start()
                trainer = self._trainer(rows, order.steps, folder, watch)
                setup.stop()
                trainer.train()
            # What it put into the model: its adapter, and a forward of its own.
            trainer.model.unload()
            self._base.model.__dict__.pop("forward", None)
            turn.tokens += sum(2 * len(row.prompt) + sum(map(len, row.replies)) for row in rows)
        return finished(turn, watch, setup, self._base)

    def _trainer(self, rows: list[Row], steps: int, folder: str, watch: Watch) -> Any:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import DPOConfig, DPOTrainer

        class Watched(TrainerCallback):
            def on_step_begin(self, *_: object, **__: object) -> None:
                watch.start()

            def on_step_end(self, *_: object, **__: object) -> None:
                watch.stop()

        base, settings = self._base, self._settings
        config = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(rows) // steps,
            max_steps=steps,
            learning_rate=settings.learning_rate,
            use_cpu=base.device.type == "cpu",
            # The model is as it was loaded: float32 on a CPU, bfloat16 on CUDA, adapters in float32.
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            train_sampling_strategy="sequential",
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        decoded = [[base.tokenizer.decode(ids) for ids in (row.prompt, *row.replies)] for row in rows]
        pairs = Dataset.from_list(
            [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in decoded]
        )
        trainer = DPOTrainer(
            model=base.model,
            args=config,
            train_dataset=pairs,
            processing_class=base.tokenizer,
            peft_config=lora_config(settings),
            callbacks=[Watched()],
        )
        # It prints where nothing else tells; the benchmark's own table does.
        trainer.remove_callback(PrinterCallback)
        return trainer


def rows_of(learner: Learner, order: Order) -> list[Row]:
    """The pairs of these steps, in the plan's order and with the context where the plan shows it."""
    draws = [draw for step in learner.plan[order.first : order.first + order.steps] for draw in step]
    return [learner.examples[number].row(context=seen) for number, seen in draws]
