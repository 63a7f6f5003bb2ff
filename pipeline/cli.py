"""The `kava` command. Each verb is a few lines over `stages`; what costs time to import is imported where it is used.

Exit codes: 0 done, 1 a fault (damage, or a bug), 2 the user's input, 75 try the same command again.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import EXIT_FAULT, EXIT_RETRY, EXIT_USER, KavaError, RecipeError
from ..terminal import escape_unprintable, file_name_fault
from .cli_results import compare, evaluate, report
from .cli_run import check_recipe, plan_run, report_projection, run_named, teachers_of, tell
from .cli_status import plan, status
from .cli_store import (
    OnlyTeacher,
    Overrides,
    RecipePath,
    Scheduler,
    inspect,
    load,
    out,
    repair,
    say,
    transcode,
    verify,
)
from .cluster.options import OnlyFailed, Parts, Rank, WorldSize, share_of
from .cluster.signals import Stopped, stopping_on_signals
from .commands.choose import check_stage, choose_stages

app = typer.Typer(
    name="kava",
    help="Distil the KV cache of large teacher LLMs into a small student, offline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Force = Annotated[bool, typer.Option("--force", help="Rebuild the output; the old one stays until it is complete.")]


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a first recipe, with every section explained."""
    from importlib.resources import files

    from ..store.files import refuse_url, write_atomic

    refuse_url(path)
    if path.exists() and not force:
        raise RecipeError(f"{path} is there already; give another name, or --force to overwrite it")
    write_atomic(path, files("kava.pipeline").joinpath("starter.yaml").read_bytes())
    out.print(f"Wrote {path}. Next: edit it, then  kava run {path} --dry-run")


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Begin at this stage.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="STAGE", help="Only this stage. Repeatable.")
    ] = None,
    force: Annotated[
        list[str] | None, typer.Option("--force", metavar="STAGE", help="Make this stage again. Repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    teacher: OnlyTeacher = None,
    scheduler: Scheduler = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    parts: Parts = None,
    only_failed: OnlyFailed = False,
) -> None:
    """Run what is missing or stale: generate, student, extract, reference, resample, project, select, fuse, train."""
    loaded = load(recipe, overrides)
    chosen = choose_stages(first, until, only)
    for name in force or []:
        check_stage(name, "--force")
        if name not in chosen:
            raise RecipeError(f"--force {name}: that stage is not among those to run ({', '.join(chosen)})")
    if dry_run:
        from .commands.plan import QUICK

        plan_run(loaded, chosen, sample=QUICK, teacher=teacher, scheduler=scheduler, fits=False)
        return
    share = share_of(rank, world_size, parts)
    if not share.is_all and chosen[-1] == "train":
        raise RecipeError(
            f"training is not split by parts ({share}); add --until fuse, and run kava train once after it"
        )
    run_named(loaded, chosen, frozenset(force or []), scheduler, teacher, share, only_failed, always_save=True)


@app.command()
def extract(
    recipe: RecipePath,
    overrides: Overrides = None,
    teacher: OnlyTeacher = None,
    force: Force = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Capture parts with failed samples again.")
    ] = False,
    check_parity: Annotated[
        int | None,
        typer.Option(
            "--check-parity",
            metavar="N",
            min=1,
            help="Store nothing; compare N samples with Hugging Face in float32, layer by layer.",
        ),
    ] = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    parts: Parts = None,
    only_failed: OnlyFailed = False,
) -> None:
    """Capture the teachers' keys and values into stores."""
    loaded = load(recipe, overrides)
    if check_parity:
        if force or retry_failed or only_failed or any(option is not None for option in (rank, world_size, parts)):
            raise RecipeError(
                "--check-parity stores nothing, so it goes without --force, --retry-failed, --only-failed, --rank and "
                "--parts"
            )
        from .commands.parity import measure_parity, print_parity

        check_recipe(loaded, ["extract"], None, teacher)
        found = [measure_parity(loaded, name, check_parity) for name in teachers_of(loaded, teacher)]
        for parity in found:
            print_parity(parity, out)
        if not all(parity.holds for parity in found):
            raise typer.Exit(EXIT_FAULT)
        return
    share = share_of(rank, world_size, parts)
    if retry_failed and force:
        raise RecipeError("--retry-failed goes without --force, which captures everything again")
    if retry_failed:
        from .repair import retry_failed as retry

        check_recipe(loaded, ["extract"], None, teacher)
        retry(loaded, teachers_of(loaded, teacher), share, say)
    run_named(
        loaded, ["generate", "extract"], frozenset({"extract"} if force else ()), None, teacher, share, only_failed
    )


@app.command()
def resample(
    recipe: RecipePath,
    overrides: Overrides = None,
    teacher: OnlyTeacher = None,
    force: Force = False,
    scheduler: Scheduler = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    parts: Parts = None,
    only_failed: OnlyFailed = False,
) -> None:
    """Write the teachers' captures on the student's tokens, still in the teachers' geometry."""
    loaded = load(recipe, [*(overrides or []), "resample.materialize=true"])
    share = share_of(rank, world_size, parts)
    forced = frozenset({"resample"} if force else ())
    run_named(loaded, ["student", "resample"], forced, scheduler, teacher, share, only_failed)


@app.command()
def project(
    recipe: RecipePath,
    overrides: Overrides = None,
    teacher: OnlyTeacher = None,
    force: Force = False,
    scheduler: Scheduler = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write no targets; fit the projector, measure it and draw it.")
    ] = False,
    rank: Rank = None,
    world_size: WorldSize = None,
    parts: Parts = None,
    only_failed: OnlyFailed = False,
) -> None:
    """Make the student's targets: resample time and project layers, heads and width."""
    loaded = load(recipe, overrides)
    share = share_of(rank, world_size, parts)
    if report:
        if force or only_failed or not share.is_all:
            raise RecipeError(
                "--report makes no targets, so it goes without --force, --only-failed, --rank and --parts; a stale "
                "projector is fitted again"
            )
        report_projection(loaded, teacher, scheduler)
        return
    stages = ["student", "reference", *(["resample"] if loaded.recipe.resample.materialize else []), "project"]
    run_named(loaded, stages, frozenset({"project"} if force else ()), scheduler, teacher, share, only_failed)


@app.command()
def select(
    recipe: RecipePath,
    overrides: Overrides = None,
    teacher: OnlyTeacher = None,
    force: Force = False,
    scheduler: Scheduler = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    parts: Parts = None,
    only_failed: OnlyFailed = False,
) -> None:
    """Fill slots: the tokens of each sample that matter most, for each layer and KV head its own."""
    loaded = load(recipe, overrides)
    if loaded.recipe.select is None:
        raise RecipeError(f"{recipe} has no select section; add one, or say -s select.tokens=24")
    before = ["student", "reference", "resample", "project"] if loaded.recipe.select.geometry == "student" else []
    share = share_of(rank, world_size, parts)
    run_named(
        loaded, [*before, "select"], frozenset({"select"} if force else ()), scheduler, teacher, share, only_failed
    )


@app.command()
def fuse(
    recipe: RecipePath,
    overrides: Overrides = None,
    force: Force = False,
    scheduler: Scheduler = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    parts: Parts = None,
    only_failed: OnlyFailed = False,
) -> None:
    """Fuse the targets of several teachers into those that the student is trained on."""
    loaded = load(recipe, overrides)
    if loaded.recipe.fuse is None:
        raise RecipeError(f"{recipe} has no fuse section; add one, or say -s fuse.weights=fixed")
    share = share_of(rank, world_size, parts)
    run_named(loaded, ["fuse"], frozenset({"fuse"} if force else ()), scheduler, None, share, only_failed)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, force: Force = False) -> None:
    """Train the student on cached targets; no teacher is loaded. Under torchrun on several devices."""
    run_named(load(recipe, overrides), ["train"], frozenset({"train"} if force else ()), None)


app.command()(evaluate)
app.command()(compare)
app.command()(report)


app.command()(inspect)
app.command()(plan)
app.command()(status)
app.command()(verify)
app.command()(repair)


app.command()(transcode)


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks, and what libraries log.")] = False,
) -> None:
    """Distil the KV cache of large teacher LLMs into a small student, offline."""
    from .. import __version__

    if version:
        out.print(__version__)
        raise typer.Exit
    if verbose:
        os.environ["KAVA_VERBOSE"] = "1"
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    else:
        _quiet_libraries()


def main() -> None:
    """The console script: runs the command and turns errors into one line and an exit code."""
    escape_unprintable()
    try:
        with stopping_on_signals():
            app()
    except KavaError as error:
        _fail(str(error), error.exit_code, error)
    except Stopped as error:
        _fail(str(error), EXIT_RETRY, error)
    except OSError as error:
        from ..store.files import disk_errors, reading

        path = Path(error.filename or ".")
        try:
            hidden = not os.access(path, os.R_OK) and (os.path.lexists(path) or not os.access(path.parent, os.X_OK))
            with reading(path) if hidden else disk_errors(path):
                raise
        except KavaError as told:
            _fail(str(told), told.exit_code, error)
    except UnicodeEncodeError as error:
        if (fault := file_name_fault(error)) is None:
            raise
        _fail(fault, EXIT_USER, error)


def _fail(message: str, code: int, error: BaseException) -> None:
    tell(error, message)
    sys.exit(code)


def _quiet_libraries() -> None:
    """Libraries talk of their own matters on stderr; a user who wants that says `--verbose`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
