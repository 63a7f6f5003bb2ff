"""What a student loses by training on targets under a lossy codec.

Takes the finished demo, rewrites its targets under each lossy codec as `kava transcode` does, and trains the demo's
student on each: same student, batches and steps, several seeds. `none` trains without targets.

Usage, after make demo: OMP_NUM_THREADS=1 python benchmarks/lossy_students.py [SEEDS]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import torch

from kava.pipeline.recipe import load_recipe
from kava.pipeline.run import Run
from kava.pipeline.transcode import Transcoding, transcoded_manifest
from kava.store import LOSSY, KVStore
from kava.train import TrainSettings, train_student

RECIPE = Path(__file__).parents[1] / "workflows" / "demo.yaml"


def rewritten(store: KVStore, codec: str, out: Path) -> KVStore:
    """The store under another codec."""
    again = KVStore.create(out, transcoded_manifest(store.manifest, codec, store.manifest.dtype))
    for part in store.committed_parts():
        Transcoding(str(store.path), str(out))(part)
    return again


def main(seeds: str = "3") -> None:
    """Prints one row per codec: held-out CE, its difference to the lossless one for the same seed, held-out KV loss."""
    torch.set_num_threads(1)
    run = Run(load_recipe(RECIPE))
    lossless = run.open_target(run.train_teacher)
    assert isinstance(lossless, KVStore)
    print(f"{lossless}: {run.recipe.train.max_steps} steps, seeds 0 to {int(seeds) - 1}")
    print(f"{'targets':<12} {'of raw':>7} {'CE':>7} {'differences to lossless by seed':>33} {'KV loss':>8}")
    baseline: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for codec in [lossless.manifest.codec, *LOSSY, "none"]:
            store, settings = lossless, run.recipe.train
            if codec == "none":
                settings = settings.model_copy(update={"alpha": 0.0})
            elif codec in LOSSY:
                store = rewritten(lossless, codec, Path(folder) / f"{codec}.zarr")
            results = []
            for seed in range(int(seeds)):
                chosen = TrainSettings.model_validate(settings.model_dump() | {"seed": seed, "eval_steps": None})
                results.append(train_student(run.student_dir, store, Path(folder) / f"{codec}-{seed}", chosen))
            ce = [result.metrics["ce"] for result in results]
            baseline = baseline or ce
            raw = store.num_tokens * store.geometry.bytes_per_token(store.dtype.itemsize)
            size = "" if codec == "none" else f"{store.size_on_disk() / raw:.3f}"
            kv = "" if codec == "none" else f"{statistics.mean(result.metrics['kv'] for result in results):.4f}"
            off = " ".join(f"{mine - theirs:+.4f}" for mine, theirs in zip(ce, baseline, strict=True))
            print(f"{codec:<12} {size:>7} {statistics.mean(ce):>7.4f} {off:>33} {kv:>8}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
