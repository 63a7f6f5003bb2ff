"""The commands on trained students: evaluating one, comparing arms, a report of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BusyError, RecipeError, StageError
from .cli_store import Overrides, RecipePath, load, out, print_table


def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", metavar="NAME", help="Train only this arm. Repeatable.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", metavar="N", help="Train only with this seed. Repeatable.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Repeat the chosen trainings; each old one stays until then."),
    ] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="Train nothing; compare what is finished.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary for programs.")] = False,
) -> None:
    """Train arms and seeds of one recipe at equal steps and batches, and compare them on held-out samples."""
    from ..train.ranks import num_processes
    from .compare_stage import SUMMARY, arm_stages, check_arms, save_summary
    from .make import run_stages
    from .preflight import Scope, refuse_broken
    from .saved_recipe import recipe_saved

    loaded = load(recipe, overrides)
    stages: list[Any] = list(arm_stages(loaded, arm, seed))
    if (count := num_processes()) > 1:
        raise StageError(
            f"torchrun is for kava train: each training of a comparison would run {count} times; give every device "
            "one of its own, with --arm and --seed"
        )
    if force and no_train:
        raise RecipeError("--force goes without --no-train")

    def say(label: str, line: str) -> None:
        if not as_json:
            out.print(f"{label + ':':<28} {line}", markup=False)

    if not no_train:
        refuse_broken(Scope(loaded, frozenset({"compare"})))
        check_arms(loaded, stages)
    busy: BusyError | None = None
    for stage in [] if no_train else stages:
        try:
            with recipe_saved(loaded) as on_make:
                run_stages([stage], force=frozenset({"compare"} if force else ()), say=say, on_make=on_make)
        except BusyError as error:  # Another `kava compare` is at it: there is more to train meanwhile.
            say(stage.label, "another process is training it; left out")
            busy = error
    if busy is not None and all(stage.status().state != "complete" for stage in arm_stages(loaded)):
        raise busy
    summary = save_summary(loaded)
    if as_json:
        out.print_json(json.dumps(summary))
        return
    from .commands.compare import arm_rows, as_table, compared_with, difference_rows

    for rows in (arm_rows(summary), difference_rows(summary, compared_with(summary))):
        out.print()
        print_table(as_table(rows))
    if summary["missing"]:
        names = ", ".join(f"{name} seed {number}" for name, number in summary["missing"])
        out.print(f"\nnot finished yet: {names}", markup=False)
    out.print(f"\n{loaded.compare_dir / SUMMARY}", markup=False)


def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|STUDENT",
            help="A recipe, for its trained student, or a folder of weights.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    recipe: Annotated[
        Path | None, typer.Option(help="The run's recipe; for a folder, the one that training left there if not given.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Let the student answer, and compare numbers.")
    ] = True,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Answer at most N questions, and N of each task.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Of each answer.")] = 256,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Samples, or prompts, at a time.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, float16.")] = "float32",
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK,...", help="Tasks of lm-eval as well (the extra eval): names, or YAML files."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of tasks of your own, for --tasks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Measure a trained student: held-out cross-entropy, KV error, exact match on numeric answers, lm-eval tasks."""
    from .commands.evaluate import RESULT, Student, evaluate_student, result_table

    if dtype not in ("float32", "bfloat16", "float16"):
        raise RecipeError(f"--dtype {dtype}: use float32, bfloat16 or float16")
    names = [name for word in (tasks or "").split(",") if (name := word.strip())]
    if include_path is not None and not names:
        raise RecipeError(f"--include-path {include_path} is where tasks are looked for: say --tasks TASK too")
    student = Student.find(path, recipe, overrides or ())
    found = evaluate_student(
        student,
        dtype=dtype,
        batch_size=batch_size,
        generate=generate,
        limit=limit,
        max_new_tokens=max_new_tokens,
        tasks=names,
        include_path=include_path,
    )
    if as_json:
        out.print_json(json.dumps(found))
        return
    print_table(result_table(found))
    out.print(f"\n{student.folder / RESULT}", markup=False)


def report(
    recipe: RecipePath,
    overrides: Overrides = None,
    projection: Annotated[
        bool,
        typer.Option(
            "--projection/--no-projection", help="Measure the projection where it is not yet, which takes a while."
        ),
    ] = True,
) -> None:
    """Write one HTML page with everything that is known of a run: stages, curves, statistics, pictures, provenance."""
    from .report.run_report import write_report
    from .saved_recipe import save_recipe

    loaded = load(recipe, overrides)
    path = write_report(loaded, project=projection, say=lambda line: out.print(line, markup=False))
    save_recipe(loaded)
    out.print(str(path), markup=False)
