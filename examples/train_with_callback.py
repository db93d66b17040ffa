"""Watch a training from your own code: a callback is called at every interval, validation and checkpoint.

    python examples/train_with_callback.py DATASET RUN

The callback here prints and remembers the best validation; an exception that one raises ends the training.
"""

import sys
import time
from pathlib import Path

from torchdlrm import Callback, TrainingHistory, load_config, train


class Watch(Callback):
    """Prints what happens, and remembers the best validation."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        self.best_auc = 0.0

    def on_log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Print the interval's loss."""
        print(f"{time.monotonic() - self.started_s:6.1f} s  step {step}: loss {metrics['loss']:.4f}")

    def on_validation(self, step: int, metrics: dict[str, float | None]) -> None:
        """Remember the best AUC; it is None where all labels are the same."""
        self.best_auc = max(self.best_auc, metrics["auc"] or 0.0)
        print(f"step {step}: validation AUC {metrics['auc']:.4f}, best {self.best_auc:.4f}")

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Copy it elsewhere, if you like: it is complete."""
        print(f"step {step}: saved to {path}")


def main(dataset: str, run: str) -> TrainingHistory:
    """Train on the dataset; what the run folder keeps besides is documented in docs/training.md."""
    config = load_config("criteo-small", {"logging.every_steps": "10", "validation.every_steps": "20"})
    history = train(config, dataset, run, callbacks=[Watch()])
    print(f"{history.summary.rows_per_s:,.0f} rows/s; validation AUC over steps: {history.series('val', 'auc')}")
    return history


if __name__ == "__main__":
    main(*sys.argv[1:])
