"""Writes docs/cli/*.md from the command itself. `python docs/make_cli.py --check` fails if a page is not up to date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from kava.pipeline.cli import app

FOLDER = Path(__file__).parent / "cli"

EXAMPLES = {
    "init": ["kava init recipe.yaml"],
    "run": [
        "kava run workflows/demo.yaml",
        "kava run workflows/qwen2-7b-tinyllama.yaml --dry-run",
        "kava run workflows/demo.yaml --from reference --until project",
        "kava run workflows/demo.yaml --only project --force project -s project.heads=pca",
    ],
    "extract": [
        "kava extract workflows/demo.yaml --teacher smollm2",
        "kava extract workflows/demo.yaml --retry-failed",
        "kava extract workflows/demo.yaml --rank 0 --world-size 4",
        "kava extract workflows/demo.yaml --parts 12-40 --rank auto",
    ],
    "resample": ["kava resample workflows/demo.yaml -s resample.method=linear"],
    "project": [
        "kava project workflows/demo.yaml",
        "kava project workflows/demo.yaml --scheduler tcp://head:8786",
        "kava project workflows/demo.yaml --report",
        "kava project workflows/demo.yaml --report -s project.layers=best -s project.heads=cca",
    ],
    "select": [
        "kava select workflows/demo.yaml -s select.tokens=24 -s select.method=uniform",
        "kava select workflows/demo.yaml -s extract.importance=true -s select.tokens=24 --scheduler tcp://head:8786",
    ],
    "fuse": [
        "kava fuse workflows/two-teachers.yaml",
        "kava fuse workflows/two-teachers.yaml -s fuse.weights=entropy -s fuse.temperature=1",
        "kava fuse workflows/two-teachers.yaml -s fuse.materialize=false",
    ],
    "train": ["kava train workflows/demo.yaml -s train.name=plain -s train.alpha=0"],
    "evaluate": [
        "kava evaluate workflows/demo.yaml",
        "kava evaluate runs/demo/students/kv --limit 100 --max-new-tokens 200",
        "kava evaluate some/model --recipe workflows/demo.yaml --no-generate --json",
        "kava evaluate workflows/qwen2-7b-tinyllama.yaml --tasks gsm8k,arc_easy --dtype bfloat16",
        "kava evaluate workflows/demo.yaml --tasks sums,sums_choice --include-path tasks",
    ],
    "compare": [
        "kava compare workflows/gsm8k-compare.yaml",
        "kava compare workflows/gsm8k-compare.yaml --arm kv --seed 1",
        "kava compare workflows/gsm8k-compare.yaml --no-train --json",
    ],
    "report": [
        "kava report workflows/gsm8k-compare.yaml",
        "kava report workflows/demo.yaml --no-projection",
    ],
    "plan": [
        "kava plan workflows/demo.yaml",
        "kava plan workflows/demo.yaml --probe",
        "kava plan workflows/demo.yaml --sample 500 --json -s extract.codec=int8",
    ],
    "status": [
        "kava status workflows/demo.yaml",
        "kava status workflows/demo.yaml --json",
        "kava status workflows/demo.yaml --watch --every 10",
    ],
    "inspect": [
        "kava inspect workflows/demo.yaml",
        "kava inspect runs/demo/targets/smollm2.zarr",
        "kava inspect runs/demo/teachers/smollm2.zarr --sample 3",
        "kava inspect runs/demo/targets/smollm2.zarr --align 3",
    ],
    "verify": [
        "kava verify workflows/demo.yaml",
        "kava verify runs/demo/teachers/smollm2.zarr runs/demo/targets/smollm2.zarr",
    ],
    "repair": [
        "kava repair workflows/demo.yaml",
        "kava repair workflows/demo.yaml --store extract --failed",
    ],
    "transcode": [
        "kava transcode runs/demo/teachers/smollm2.zarr /archive/smollm2.zarr --codec int8",
        "kava transcode runs/demo/targets/smollm2.zarr /nvme/smollm2.zarr --codec none",
    ],
}

NOTES = {
    "run": "A stage that is up to date is skipped. A stale capture, generated corpus or training is not replaced\n"
    "without `--force`. An output that is replaced stays until the new one is complete.",
    "extract": "Resumes at the first missing part. `--retry-failed` first captures the parts with failed samples again;"
    "\neach old part stays until its new one is complete.",
    "resample": "Optional: `kava project` resamples and projects in one pass. The resampled store is for looking at.",
    "project": "Makes the student and its reference first where they are missing; saves the projector too.\n\n"
    "`--report` prints a row for each student layer and writes `projectors/NAME.report.json` and\n"
    "`projectors/NAME.png`: the teacher layers, their CKA, held-out R² of keys and values for this projector and\n"
    "for the plainest map, the share of the teacher's variance that is kept, and how near the student's attention\n"
    "stays to its own. Compare settings with `-s` before any target is written; a projector that made targets\n"
    "which are there stays as it is. Before the capture there is the layer map alone.",
    "select": "Reads the teacher stores; with `select.geometry: student` the student and its projector are made first.",
    "fuse": "The targets must be complete. With `fuse.materialize: false` no store is written: they are read through\n"
    "once, for their statistics, and training fuses while it reads.",
    "plan": "Nothing of the run is made. Exit code 2 if the recipe is broken or the run cannot fit: [checks and\n"
    "estimates](../plan.md).",
    "status": "[The keys of `--json`](../cluster.md#kava-status).",
    "train": "Goes on at its last checkpoint where `train.save_steps` is set. The targets must be complete. On\n"
    "several devices: `torchrun --nproc-per-node 4 -m kava train RECIPE`.",
    "evaluate": "Writes `evaluate.json` and `answers.jsonl` to the student's folder. Cross-entropy is over the tokens\n"
    "of `train.ce_segments`, and per byte of text, which compares across tokenizers: a folder with any model goes,\n"
    "with `--recipe`. KV error is the squared error of keys and values over the variance of the targets, by layer; it\n"
    "needs the targets' tokenizer. Answers are greedy, from the prompt as it was trained on; the number after the\n"
    "first `####`, else in the first `\\boxed{}`, else the last one, is compared by value with that of the answer\n"
    "(`1,234`, `1{,}234`, `1,23,456`, `$5.00`, `3/4`, `\\frac{3}{4}`, `2^{10}`\n"
    "and negatives are read), with Wilson's 95 %. `--tasks` are lm-eval's, which finds or downloads their data by\n"
    "itself, and [tasks of your own](../howto/tasks.md): YAML files, or names that `--include-path` has.",
    "compare": "Each arm and seed is a training in a folder of its own below `run_dir/compare`: what is finished is\n"
    "kept, an interrupted one resumes, and a training whose recipe or targets changed is refused without `--force`,\n"
    "which makes the chosen ones again. `--arm` and `--seed` make one call one job of an array; a last `--no-train`\n"
    "compares them all. The targets must be complete. [The recipe](../recipe.md#compare) has the arms, and what is\n"
    "computed.",
    "report": "Writes `run_dir/report.html`: each stage with its size and time, held-out curves with 95 %, the\n"
    "tables of `kava compare`, KV error by layer as heat maps, layer map and projection (see `kava project\n"
    "--report`), fingerprints, versions and the recipe. The page holds its pictures and asks for no other file and\n"
    "no network; it can be sent, printed, and read on a phone. What is not there yet is left out, with the command\n"
    "that makes it.",
    "inspect": "Finds the run's recipe beside the store to show tokens and text.",
    "verify": "For a store, names the damaged part, array, chunk and sample. For a recipe, checks the whole run: its\n"
    "stores, and the generated corpus, the student, projectors, the fusion, trained students, their\n"
    "checkpoints and the trainings of a comparison, each file against the size and hash in its record.\n\n"
    "Every byte is read; neither the teachers nor the corpus are needed. Results (`evaluate.json`,\n"
    "`answers.jsonl`, `compare.json`), reports and files of trackers are not sealed. `kava status` is quicker: it\n"
    "does not read stores, and compares only the size of other files above 64 MiB. Exit code 1 if anything\n"
    "is damaged.",
    "repair": "Verifies every output of the recipe that exists. Damaged parts are set aside and rebuilt: captures by\n"
    "the teacher, derived parts from their parents. A derived part is rebuilt too if its parent now has\n"
    "other bits. Intact stores and missing parts are left alone. An interrupted repair resumes with the\n"
    "same command.\n\n"
    "The student, projectors and the generated corpus are rebuilt too. A student or projector is put in\n"
    "place only if it has the recorded bits: another one would make everything derived from it stale. A\n"
    "fusion is measured again. A trained student is only reported, as only training can rebuild it\n"
    "(`kava train --force`). A damaged checkpoint is not used: training resumes from the one before.\n\n"
    "Afterwards, files that killed processes left beside the outputs are removed once nobody holds their\n"
    "lock, also those of a host with another name, such as a container. On read-only media the command\n"
    "only checks. Exit code 1 if something remains damaged.",
    "transcode": "From one lossless codec to the other the content is the same, and `OUT` can take the place of "
    "`STORE`: what was made from it stays up to date, if the recipe's `codec` says the new one. A lossy codec or "
    "another dtype makes other content. Checksums are checked as chunks are read. [The format](../store-format.md) has "
    "the codecs, [the benchmarks](../benchmarks.md) their errors.",
}


def page(name: str, command: Any) -> str:
    """One command's page."""
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            label = parameter.metavar or parameter.name.upper()
            text = parameter.help or ""
        else:
            value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
            label = ", ".join(sorted(parameter.opts, key=len)) + value
            text = parameter.help or ""
        rows.append(f"| `{label}` | {text} |")
    usage = " ".join(p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument")
    lines = [f"# kava {name}", "", str(command.help).strip(), "", "```", f"kava {name} {usage} [OPTIONS]", "```", ""]
    lines += [NOTES[name], ""] if name in NOTES else []
    lines += ["| | |", "|---|---|", *rows, "", "## Examples", "", "```bash", *EXAMPLES[name], "```", ""]
    lines += ["Exit codes: 0 done, 1 a fault, 2 the input is wrong, 75 the same command may be run again later.", ""]
    return "\n".join(lines)


def main(check: bool) -> int:
    """Writes the pages, or says which would change."""
    group: Any = typer.main.get_command(app)
    pages = {FOLDER / f"{name}.md": page(name, command) for name, command in group.commands.items()}
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text() != text]
    if check:
        for path in stale:
            print(f"{path} is not up to date: python docs/make_cli.py")
        return len(stale)
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
