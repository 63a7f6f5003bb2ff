"""The store of another revision beside this one: reading and writing the same samples, interleaved in one run.

The other revision's sources are taken out of git into a temporary folder. Each measurement is a process of its own that
imports one of the two; rounds alternate, so that other load on the machine disturbs both. Printed are the CPU time of
the fastest round of each, and their ratio.

Usage: OMP_NUM_THREADS=1 python benchmarks/versions.py REVISION [ROUNDS]
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODECS = ("none", "blosc-zstd")
SETTINGS = {
    "30x3x64, 96 samples of 360 tokens": {"geometry": (30, 3, 64), "tokens": 360, "samples": 96},
    "28x4x128, 48 samples of 360 tokens": {"geometry": (28, 4, 128), "tokens": 360, "samples": 48},
}

WORK = """
import json, sys, time
from pathlib import Path
import numpy as np, torch
from kava.store import *

folder, codec, (layers, heads, width), tokens, count, what = json.loads(sys.argv[1])
torch.set_num_threads(1)
geometry = KVGeometry(num_layers=layers, num_key_value_heads=heads, head_dim=width)
manifest = Manifest(
    kind="capture", geometry=geometry, dtype="bfloat16", codec=codec,
    page_tokens=default_page_tokens(geometry, 2, codec), num_samples=count, samples_per_part=count,
    model=ModelIdentity(id="random", compute_dtype="float32"), tokenizer_digest="t", corpus_digest="c",
)
path = Path(folder) / "s.zarr"
if what == "write":
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    ends = np.arange(1, tokens + 1, dtype=np.int32)
    samples = []
    for number in range(count):
        kv = (torch.randn((tokens, *geometry.shape), generator=generator).bfloat16() for _ in range(2))
        samples.append(KVSample(
            f"s{number}", Split.TRAIN, *kv, rng.integers(0, 9, tokens).astype(np.int32), ends - 1,
            np.stack([ends - 1, ends], 1), np.full(tokens, 1, np.uint8), np.ones(tokens, np.bool_),
        ))
    store = KVStore.create(path, manifest)
    begun = time.process_time()
    with store.write_part(0) as writer:
        for number, sample in enumerate(samples):
            writer.append(number, sample)
        writer.commit()
    print(time.process_time() - begun)
else:
    store = KVStore.open(path)
    rooms = [np.zeros((tokens, *geometry.shape), "<u2") for _ in range(2)]
    order = np.random.default_rng(0).permutation(count).tolist()
    best = float("inf")
    for _ in range(5):
        begun = time.process_time()
        for index in order:
            if what == "read_into":
                store.read_into(index, keys=rooms[0], values=rooms[1])
            else:
                store[index]
        best = min(best, time.process_time() - begun)
    print(best)
"""


def sources(revision: str, folder: Path) -> Path:
    """Unpack the sources of a revision; return the folder to import from."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="tar")
    return folder / "src"


def seconds(source: Path, folder: Path, codec: str, setting: dict[str, object], what: str) -> float:
    """CPU seconds of one measurement with the sources in `source`."""
    words = json.dumps([str(folder), codec, setting["geometry"], setting["tokens"], setting["samples"], what])
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORK, words]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(run.stdout)


def main() -> None:
    """Measure and print."""
    revision, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    print(f"{'':<36} {'codec':<11} {'':<10} {revision[:10]:>10} {'now':>8} {'now / before':>13}")
    with tempfile.TemporaryDirectory(prefix="kava-versions-") as temporary:
        root = Path(temporary)
        arms = {"before": sources(revision, root / "before"), "now": ROOT / "src"}
        for name, setting in SETTINGS.items():
            for codec in CODECS:
                best: dict[tuple[str, str], float] = {}
                for number in range(rounds):
                    for arm, source in arms.items():
                        folder = root / f"{arm}-{codec}-{setting['geometry']}-{number}"
                        folder.mkdir()
                        for what in ("write", "read_into", "sample"):
                            found = seconds(source, folder, codec, setting, what)
                            best[arm, what] = min(found, best.get((arm, what), float("inf")))
                        subprocess.run(["rm", "-rf", str(folder)], check=True)
                for what in ("write", "read_into", "sample"):
                    before, now = best["before", what], best["now", what]
                    print(f"{name:<36} {codec:<11} {what:<10} {before:>10.3f} {now:>8.3f} {now / before:>13.3f}")


if __name__ == "__main__":
    main()
