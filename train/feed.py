"""What one rank of a training is fed: batches of its share of the order, from any step on."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import KavaError, StageError
from ..store import Split
from .data import IGNORED, TargetCollator, TargetDataset
from .loader import Batches, Loader, ProcessLoader, ThreadedLoader
from .logits import taught
from .losses import KVLoss
from .order import Order, Row
from .ranks import Ranks, agreed
from .settings import TrainSettings


@dataclass(frozen=True)
class TrainingRows:
    """The rows of each batch of one rank: of every batch of all, its own run of them."""

    order: Order
    rows: int
    rank: int
    ranks: int

    def __call__(self, number: int) -> list[Row]:
        """Those of batch `number`."""
        first = (number * self.ranks + self.rank) * self.rows
        return self.order.rows(first, self.rows)


@dataclass(frozen=True)
class _HeldoutRows:
    """Held-out samples one by one, in the order of the store; batches go to the ranks in turn.

    All ranks have as many batches. Where there are no samples left for one, its last batch is the first sample again.
    """

    samples: int
    rows: int
    rank: int
    ranks: int

    def __call__(self, number: int) -> list[Row]:
        first = self._first(number)
        return [(item,) for item in range(first, min(first + self.rows, self.samples))] or [(0,)]

    def __len__(self) -> int:
        return -(-self.samples // (self.rows * self.ranks))

    def counts(self, number: int) -> bool:
        """Whether a batch has samples of its own."""
        return self._first(number) < self.samples

    def _first(self, number: int) -> int:
        return (number * self.ranks + self.rank) * self.rows


class Feed:
    """The batches of one rank: a training's, step by step, and the held-out ones."""

    def __init__(
        self,
        datasets: Mapping[Split, TargetDataset],
        collator: TargetCollator,
        settings: TrainSettings,
        args: Any,
        ranks: Ranks,
    ) -> None:
        """The batches of one rank; nothing is read yet.

        Args:
            datasets: of both splits.
            collator: makes batches.
            settings: how to read ahead, and what order.
            args: `transformers.TrainingArguments`: sizes and seeds.
            ranks: this rank among all.

        Raises:
            StageError: if a sample does not fit into a row.
        """
        self._datasets, self._collator, self._settings, self._args, self._ranks = (
            datasets,
            collator,
            settings,
            args,
            ranks,
        )
        train = datasets[Split.TRAIN]
        self._accumulated, self._rows = args.gradient_accumulation_steps, args.per_device_train_batch_size
        self.num_batches = args.max_steps * self._accumulated
        """Forward passes of the whole training."""
        self.order = Order(
            train.lengths,
            train.parts,
            seed=args.seed if args.data_seed is None else args.data_seed,
            window=settings.shuffle_window,
            group=self._rows * ranks.size if settings.group_by_length else None,
            pack_tokens=settings.pack_tokens,
        )
        self._loader: Loader | None = None

    def step(self, step: int, count: int) -> list[dict[str, Any]]:
        """The batches of the step after `step` finished ones: `count` of them, valid until the next call.

        The first call says where to begin; steps then follow each other.
        """
        if self._loader is None:
            rows = TrainingRows(self.order, self._rows, self._ranks.rank, self._ranks.size)
            batches = Batches(self._datasets[Split.TRAIN], self._collator, rows, self.num_batches)
            self._loader = self._open(batches, step * self._accumulated)
        return self._loader.take(count)

    def heldout(self) -> Generator[tuple[dict[str, Any], bool], None, None]:
        """This rank's held-out batches, each valid until the next, and whether they count.

        As many on each rank, for a forward pass of a sharded student is one of all: what a rank has too many does not
        count.
        """
        dataset, size = self._datasets[Split.HELDOUT], self._args.per_device_eval_batch_size
        rows = _HeldoutRows(len(dataset), size, self._ranks.rank, self._ranks.size)
        loader = self._open(Batches(dataset, self._collator, rows, len(rows)), 0)
        try:
            for number in range(len(rows)):
                yield loader.take(1)[0], rows.counts(number)
        finally:
            loader.close()

    def epochs(self, step: int) -> float:
        """How many epochs are behind after `step` steps."""
        return self.order.epochs(self._first_row(step))

    def state(self, step: int) -> dict[str, Any]:
        """For a checkpoint after `step` steps."""
        return self.order.state(self._first_row(step)) | {"rows": self._rows, "ranks": self._ranks.size}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` was of.

        Raises:
            StageError: if the next batches would not be those that would have followed.
        """
        for name, now in (("ranks", self._ranks.size), ("rows", self._rows)):
            if state[name] != now:
                raise StageError(
                    f"the checkpoint is of a training with {state['ranks']} processes of {state['rows']} rows each, "
                    f"this one has {self._ranks.size} of {self._rows}: go on as it was begun, or begin again with "
                    "--force train"
                )
        self.order.load(state)

    def close(self) -> None:
        """Ends what reads ahead."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _first_row(self, step: int) -> int:
        first: int = step * self._accumulated * self._rows * self._ranks.size
        return first

    def _open(self, batches: Batches, first: int) -> Loader:
        args = self._args
        pin = args.dataloader_pin_memory and args.device.type != "cpu"
        if args.dataloader_num_workers:
            return ProcessLoader(
                batches,
                first=first,
                workers=args.dataloader_num_workers,
                pin_memory=pin,
                prefetch_factor=args.dataloader_prefetch_factor,
                multiprocessing_context=args.dataloader_multiprocessing_context,
            )
        ahead = self._settings.prefetch_steps * self._accumulated
        return ThreadedLoader(batches, first=first, threads=self._settings.reader_threads, ahead=ahead, pin=pin)


def share_step(batches: list[dict[str, Any]], loss: KVLoss | None, ranks: Ranks, error: KavaError | None) -> None:
    """Gives each batch of a step its `shares` of the step's predicted tokens, those with a target, and with logits.

    The loss of a step is the mean over its tokens, however they are cut into ranks, forward passes and rows. Each
    batch's own mean is multiplied with its share, such that the mean over forward passes and ranks is that over tokens.

    Args:
        batches: of this rank's step; each gets `shares`, for the cross-entropy, the KV loss and the logit loss.
        loss: the KV loss, if there is one.
        ranks: all of them; they wait for each other here.
        error: why this rank has no batches.

    Raises:
        KavaError: `error`, of the first rank that has one, on all of them.
    """
    counts = [_counts(batch, loss) for batch in batches]
    sums = [sum(count[term] for count in counts) for term in range(3)]
    *totals, failed = ranks.sum([*sums, float(error is not None)])
    if failed:
        raise agreed(next(found for found in ranks.gather(error) if found is not None))
    scale = ranks.size * len(batches)
    for batch, count in zip(batches, counts, strict=True):
        batch["shares"] = tuple(own * scale / total if total else 1.0 for own, total in zip(count, totals, strict=True))


def _counts(batch: dict[str, Any], loss: KVLoss | None) -> tuple[float, float, float]:
    """What the means of a batch are over: predicted tokens, the weights of those with a target, those with logits."""
    predicted = float((batch["labels"][:, 1:] != IGNORED).sum())
    logits = float(taught(batch["labels"], batch["logit_ids"]).sum()) if "logit_ids" in batch else 0.0
    if loss is None:
        return predicted, 0.0, logits
    return predicted, loss.total_weight(batch["kv_mask"], batch["segments"]), logits
