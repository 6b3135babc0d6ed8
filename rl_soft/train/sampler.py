"""The order of the training rows."""

from __future__ import annotations

from trl.trainer.utils import RepeatSampler


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that is a function of (seed, epoch). TRL's own draws each epoch's order from a
    generator that goes on, which a resumed run starts from the beginning: after the first epoch it would see other
    rows. The first epoch's order is the same."""

    def set_epoch(self, epoch: int) -> None:  # transformers calls it before each epoch, a resumed one included
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)
