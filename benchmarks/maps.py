"""Every head map on one pair of models: what its targets say of the student, and what they do to one that is trained.

First table: the teacher's store on the axes of a pretrained student, each map's diagnostics on held-out calibration
samples (`kava project --report`), means over layers. Second table: held-out cross-entropy of a small student with
random weights, a tokenizer and a geometry of its own, trained for equal steps on the same batches with targets of each
map; with the controls of no targets, targets of a random projection, and targets that are shuffled over the tokens of
their sample.

Usage: OMP_NUM_THREADS=2 python benchmarks/maps.py TEACHER STUDENT CORPUS.jsonl [SAMPLES] [STEPS] [SEEDS] [FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from kava.pipeline import load_recipe
from kava.pipeline.capture_stages import ExtractStage
from kava.pipeline.make import run_stages
from kava.pipeline.project_stage import ProjectStage
from kava.pipeline.report.projection import make_report, report_stages
from kava.pipeline.run import Run
from kava.pipeline.stages import stages_of
from kava.store import KVStore
from kava.store.files import remove
from kava.train import TrainSettings, train_student
from kava.train.controls import TokenShuffledTargets
from kava.train.data import Targets

MAPS: dict[str, dict[str, Any]] = {
    "mean": {"heads": "mean"},
    "random": {"heads": "random"},
    "pca": {"heads": "pca"},
    "procrustes": {"heads": "procrustes"},
    "procrustes, per head": {"heads": "procrustes", "per": "head"},
    "procrustes, layers by cka": {"heads": "procrustes", "layers": "cka"},
    "cca": {"heads": "cca"},
    "cca, per head": {"heads": "cca", "per": "head"},
    "ridge": {"heads": "ridge"},
    "ridge, best 4 layers": {"heads": "ridge", "layers": "best", "top_k": 4},
}
SMALL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


def run_of(folder: Path, teacher: str, corpus: Path, samples: int, student: dict[str, Any], **project: Any) -> Run:
    """A run with this student and this projection."""
    recipe = {
        "run_dir": str(folder),
        "corpus": {"path": str(corpus), "limit": samples, "heldout": {"ratio": 0.2}},
        "teachers": {"teacher": {"model": teacher, "dtype": "float32"}},
        "student": student,
        "project": project,
    }
    path = folder / "recipe.json"  # JSON is YAML.
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe))
    return Run(load_recipe(path))


def diagnose(run_for: Any, out: Console) -> None:
    """The first table."""
    columns = ["map", "K R2 naive", "K R2", "V R2 naive", "V R2", "K kept", "V kept", "attention naive", "attention"]
    table = Table(*columns, box=None, pad_edge=False)
    keys = ["keys_r2_naive", "keys_r2", "values_r2_naive", "values_r2", "keys_explained_variance"]
    keys += ["values_explained_variance", "attention_naive", "attention_fitted"]
    for name, project in MAPS.items():
        run = run_for(**project)
        run_stages(report_stages(run))
        report = make_report(run, "teacher")
        table.add_row(name, *(f"{fmean(row[key] for row in report.rows()):.3f}" for key in keys))
        print(f"  {name}: {report.settings}", file=sys.stderr, flush=True)
    out.print(f"{report.source} onto {report.target}: means over layers, on held-out calibration samples")
    out.print(table)


def compare(run_for: Any, folder: Path, steps: int, seeds: int, out: Console) -> None:
    """The second table."""
    table = Table("targets", "held-out CE", "seeds", "held-out KV loss", box=None, pad_edge=False)

    def arm(name: str, run: Run, store: Targets, alpha: float) -> None:
        found = []
        for seed in range(seeds):
            settings = TrainSettings.model_validate(
                {"max_steps": steps, "alpha": alpha, "learning_rate": 1e-3, "warmup_steps": 10, "seed": seed}
            )
            place = folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            found.append(train_student(run.student_dir, store, place, settings).metrics)
        ce = [metrics["ce"] for metrics in found]
        kv = f"{fmean(m['kv'] for m in found):.3f}" if "kv" in found[0] else "-"
        table.add_row(name, f"{fmean(ce):.4f}", " ".join(f"{x:.4f}" for x in ce), kv)
        print(f"  {name}: {ce}", file=sys.stderr, flush=True)

    for name, project in MAPS.items():
        run = run_for(**project, scale="unit")
        run_stages([s for s in stages_of(run) if s.name in ("student", "extract", "reference", "project")])
        store = KVStore.open(run.target_path("teacher"))
        if name == "mean":
            arm("none (alpha 0)", run, store, 0.0)
        arm(name, run, store, 3.0)
        if name == "procrustes":
            arm("procrustes, shuffled", run, TokenShuffledTargets(store), 3.0)
        remove(ProjectStage(run, "teacher").output)
    out.print(f"a student of {run.student_geometry}, {steps} steps of 8 samples")
    out.print(table)


def main(
    teacher: str,
    student: str,
    corpus: str,
    samples: str = "200",
    steps: str = "100",
    seeds: str = "2",
    folder: str = "",
) -> None:
    """Prints both tables."""
    out = Console(width=200, highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(folder or temporary).resolve()

        def large(**project: Any) -> Run:
            return run_of(root / "large", teacher, Path(corpus), int(samples), {"model": student}, **project)

        def small(**project: Any) -> Run:
            made = {"config": SMALL, "tokenizer": {"vocab_size": 2048}}
            return run_of(root / "small", teacher, Path(corpus), int(samples), made, **project)

        out.print(f"teacher {teacher}, {samples} samples of {Path(corpus).name}, one in five held out")
        run_stages([ExtractStage(large(), "teacher")])
        (root / "small").mkdir(exist_ok=True)
        if not (root / "small/teachers").exists():
            (root / "small/teachers").symlink_to(root / "large/teachers")
        diagnose(large, out)
        out.print()
        compare(small, root / "trained", int(steps), int(seeds), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
