"""A training step: plain fine-tuning, with keys and values from a store, and with those of a teacher that runs live.

Three processes train the same student on the same batches through `kava.train`, and take turns of a few steps, so that
whatever else the machine does meets all of them. Live, the teacher reads each batch without gradient and without its
head, and its layers go through a map as the pipeline's would; that its tokens are the student's saves it the
resampling. Weights and texts are random: times do not depend on them.

Usage: python benchmarks/training.py [TURNS [STEPS]]
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from kava.hub import tokenizer_digest
from kava.store import KVGeometry, KVSample, KVStore, Manifest, ModelIdentity, Segment, Split, default_page_tokens
from kava.tap import KVTap, decoder
from kava.train import StudentSettings, TrainSettings, load_student, make_student, train_student

ARMS: Final = {"plain": 0.0, "store": 1.0, "live": 1.0}
"""With the weight of the KV loss."""
SAMPLES, BATCH, WARM = 256, 4, 6
STUDENT: Final[dict[str, Any]] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
TEACHER: Final[dict[str, Any]] = STUDENT | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
VOCABULARY: Final = 4096


def make(root: Path) -> None:
    """The student, and a store of random targets on its axes."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"abcdefghijklmnopqrstuvwxyz"], 6)) for _ in range(6000)]
    settings = StudentSettings.model_validate({"config": STUDENT, "tokenizer": {"vocab_size": VOCABULARY}})
    make_student(settings, root / "student", [" ".join(words)] * 2)
    tokenizer = load_student(root / "student")[1]
    geometry = KVGeometry(num_layers=STUDENT["num_hidden_layers"], num_key_value_heads=4, head_dim=32)
    manifest = Manifest(
        kind="target",
        geometry=geometry,
        dtype="bfloat16",
        codec="blosc-zstd",
        page_tokens=default_page_tokens(geometry, 2),
        num_samples=SAMPLES,
        samples_per_part=64,
        model=ModelIdentity(id="random", compute_dtype="float32"),
        tokenizer_digest=tokenizer_digest(tokenizer),
        corpus_digest="random",
    )
    store = KVStore.create(root / "targets.zarr", manifest)
    for part in store.missing_parts():
        with store.write_part(part) as writer:
            for position, index in enumerate(manifest.part_samples(part)):
                writer.append(position, _sample(index, geometry, len(tokenizer)))
            writer.commit()


def _sample(index: int, geometry: KVGeometry, vocabulary: int) -> KVSample:
    rng = np.random.default_rng(index)
    tokens = int(rng.integers(96, 161))
    row = np.arange(tokens, dtype=np.int32)
    return KVSample(
        sample_id=f"s{index}",
        split=Split.TRAIN,
        keys=torch.from_numpy(rng.standard_normal((tokens, *geometry.shape), np.float32)),
        values=torch.from_numpy(rng.standard_normal((tokens, *geometry.shape), np.float32)),
        input_ids=rng.integers(0, vocabulary, tokens).astype(np.int32),
        positions=row,
        spans=np.stack([row, row + 1], axis=1),
        segments=np.full(tokens, int(Segment.ANSWER), np.uint8),
        mask=np.ones(tokens, np.bool_),
    )


def run_live() -> list[int]:
    """From here on, batches get a teacher's keys and values instead of those of the store; gives the steps that did."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from kava.train import feed, training

    values = {name: value for name, value in TEACHER.items() if name != "model_type"}
    config = AutoConfig.for_model("llama", **values, vocab_size=VOCABULARY)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    layers, width = int(STUDENT["num_hidden_layers"]), 4 * 32
    chosen = [round(n * (len(decoder(teacher).layers) - 1) / (layers - 1)) for n in range(layers)]
    maps = {side: torch.randn(layers, 2 * 64, width) / width**0.5 for side in ("keys", "values")}

    taught: list[int] = []

    class LiveFeed(feed.Feed):
        """Reads tokens alone."""

        def __init__(self, datasets: Any, *args: Any) -> None:
            for dataset in datasets.values():
                dataset.names = ()
            super().__init__(datasets, *args)

        def step(self, step: int, count: int) -> list[dict[str, Any]]:
            batches = super().step(step, count)
            taught.append(step)
            for batch in batches:
                with torch.no_grad(), KVTap(teacher, layers=sorted(set(chosen))) as tap:
                    decoder(teacher)(
                        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                    )
                    for side, found in (("keys", tap.keys), ("values", tap.values)):
                        moved = [found[n].flatten(2) @ maps[side][m] for m, n in enumerate(chosen)]
                        batch[side] = torch.stack(moved, dim=2).view(*batch["input_ids"].shape, layers, 4, 32)
            return batches

    vars(training)["Feed"] = LiveFeed
    return taught


def train(arm: str, root: Path, steps: int, turn: int, parent: Connection) -> None:
    """One arm, in a process of its own: after each turn it tells how long it took and waits for the next.

    Sends `(seconds by the clock, of CPU)` per step of a turn, and at the end the peak of resident memory in bytes and
    the share of the steps' time that went by waiting for data.
    """
    torch.set_num_threads(1)
    taught = run_live() if arm == "live" else None
    begun = [0.0, 0.0]

    def on_step(step: int, total: int) -> None:
        if step >= WARM and (step - WARM) % turn == 0:
            if step > WARM:
                # What is read ahead while the others have their turn is this arm's own work.
                parent.send(((time.perf_counter() - begun[0]) / turn, (time.process_time() - begun[1]) / turn))
            else:
                parent.send(None)
            begun[1] = time.process_time()
            parent.recv()
            begun[0] = time.perf_counter()

    settings = {"max_steps": WARM + steps, "batch_size": BATCH, "alpha": ARMS[arm], "report_to": []}
    train_student(
        root / "student",
        KVStore.open(root / "targets.zarr"),
        root / arm,
        TrainSettings.model_validate(settings),
        on_step=on_step,
    )
    if taught is not None and len(taught) != WARM + steps:
        raise RuntimeError(f"the teacher ran in {len(taught)} of {WARM + steps} steps")
    lines = [json.loads(line) for line in (root / arm / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait_share"] for line in lines if line["step"] > WARM and "data_wait_share" in line]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    parent.send((int(peak.split()[1]) * 1024, statistics.fmean(waits)))


def main(turns: int, turn: int) -> None:
    """Prints seconds per step, their ratios turn by turn, memory, and waiting."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root)
        pipes = {}
        for arm in ARMS:
            pipes[arm], theirs = context.Pipe()
            context.Process(target=train, args=(arm, root, turns * turn, turn, theirs), daemon=True).start()
            pipes[arm].recv()  # One begins after the other.
        times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
        for number in range(turns):
            for arm in list(ARMS)[:: 1 if number % 2 else -1]:
                pipes[arm].send(None)
                times[arm].append(pipes[arm].recv())
        ends = {}
        for arm, pipe in pipes.items():
            pipe.send(None)
            ends[arm] = pipe.recv()
    rows = 3 * BATCH * 160  # Two batches are read ahead of the one in hand.
    print(f"targets in memory: at most {rows * 2 * 2 * 6 * 4 * 32 / 1e6:.1f} MB")
    print(f"{'':<8} {'s a step, clock':>22} {'s a step, CPU':>22} {'peak memory':>12} {'data wait':>10}")
    for arm, found in times.items():
        clock, cpu = (_spread([taken[n] for taken in found], 3) for n in (0, 1))
        peak, wait = ends[arm]
        print(f"{arm:<8} {clock:>22} {cpu:>22} {peak / 1e6:>9.0f} MB {wait:>9.2%}")
    for one, two in (("store", "plain"), ("live", "store")):
        for number, name in enumerate(("clock", "CPU")):
            ratios = [a[number] / b[number] for a, b in zip(times[one], times[two], strict=True)]
            means = [statistics.fmean(taken[number] for taken in times[arm]) for arm in (one, two)]
            print(f"{one} / {two}, {name:<6} {_spread(ratios, 3):>22}, of the means {means[0] / means[1]:.3f}")


def _spread(values: Sequence[float], digits: int) -> str:
    """The median, and the smallest and largest."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}..{max(values):.{digits}f}]"


if __name__ == "__main__":
    main(*map(int, [*sys.argv[1:], "10", "10"][:2]))
