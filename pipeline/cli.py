"""The `kava` command. Each verb is a few lines over `stages`; what costs time to import is imported where it is used.

Exit codes: 0 done, 1 a fault (damage, or a bug), 2 the user's input, 75 try the same command again.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import EXIT_FAULT, EXIT_RETRY, EXIT_USER, KavaError, RecipeError, StageError
from ..terminal import escape_unprintable, file_name_fault
from .cli_results import compare, evaluate, report
from .cli_status import plan, status
from .cli_store import (
    OnlyTeacher,
    Overrides,
    RecipePath,
    Scheduler,
    err,
    load,
    out,
    print_table,
    repair,
    say,
    transcode,
    verify,
)
from .cluster.options import OnlyFailed, Parts, Rank, WorldSize, share_of
from .cluster.share import ALL, Share
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

    from ..store.files import write_atomic

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
        from .commands.plan import QUICK, print_plan
        from .plan import make_plan

        print_plan(make_plan(loaded, sample=QUICK), chosen, out)
        return
    from ..store.files import is_writable

    share = share_of(rank, world_size, parts)
    if not share.is_all and chosen[-1] == "train":
        raise RecipeError(
            f"training is not split by parts ({share}); add --until fuse, and run kava train once after it"
        )
    if is_writable(loaded.root):
        loaded.recipe.save(loaded.root / "recipe.yaml")
    try:
        _run(loaded, chosen, frozenset(force or []), scheduler, teacher, share, only_failed)
    finally:  # A run that was refused before it wrote anything has no folder.
        if is_writable(loaded.root):
            loaded.recipe.save(loaded.root / "recipe.yaml")


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

        found = [measure_parity(loaded, name, check_parity) for name in _teachers(loaded, teacher)]
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

        retry(loaded, _teachers(loaded, teacher), share, say)
    _run(loaded, ["generate", "extract"], frozenset({"extract"} if force else ()), None, teacher, share, only_failed)


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
    _run(loaded, ["student", "resample"], forced, scheduler, teacher, share, only_failed)


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
        _report(loaded, teacher, scheduler)
        return
    stages = ["student", "reference", *(["resample"] if loaded.recipe.resample.materialize else []), "project"]
    _run(loaded, stages, frozenset({"project"} if force else ()), scheduler, teacher, share, only_failed)


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
    _run(loaded, [*before, "select"], frozenset({"select"} if force else ()), scheduler, teacher, share, only_failed)


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
    _run(loaded, ["fuse"], frozenset({"fuse"} if force else ()), scheduler, None, share, only_failed)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, force: Force = False) -> None:
    """Train the student on cached targets; no teacher is loaded. Under torchrun on several devices."""
    _run(load(recipe, overrides), ["train"], frozenset({"train"} if force else ()), None)


app.command()(evaluate)
app.command()(compare)
app.command()(report)


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store.", show_default=False)],
    sample: Annotated[str | None, typer.Option(help="Show this sample's tokens: its number or its id.")] = None,
    align: Annotated[
        str | None, typer.Option(help="Show this sample's tokens against those of the teacher it was made from.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="The run's recipe, for tokens and text; found beside the store if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show a store to a person: manifest, sizes, per-layer statistics, one sample's tokens and spans."""
    from .commands.inspect import inspect_store

    inspect_store(store, out, sample=sample, align=align, recipe=recipe, as_json=as_json)


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
    _tell(message, error)
    sys.exit(code)


def _tell(message: str, error: BaseException) -> None:
    if os.environ.get("KAVA_VERBOSE"):
        import traceback

        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")
    err.print(f"kava: {message}" if rank == "0" else f"kava: rank {rank}: {message}", style="red", markup=False)


def _run(
    loaded: Any,
    names: list[str],
    force: frozenset[str],
    scheduler: str | None,
    teacher: str | None = None,
    share: Share = ALL,
    only_failed: bool = False,
) -> None:
    from .stages import stages_of

    if teacher is not None:
        loaded.teacher(teacher)
    stages = [s for s in stages_of(loaded) if s.name in names and (teacher is None or s.teacher in (None, teacher))]
    if not stages:
        raise RecipeError(f"this recipe asks for no stage {', '.join(names)}; docs/recipe.md says which section does")
    if share.parts is not None and not any(s.splits and s.name != "generate" for s in stages):
        raise RecipeError(f"--parts: {', '.join(names)} has no parts of a store; split generate by --rank")
    if only_failed:
        if force:
            raise RecipeError("--only-failed goes without --force, which makes everything again")
        from .repair import repair_stage
        from .store_stages import StoreStage

        for stage in stages:
            if isinstance(stage, StoreStage):
                repair_stage(stage, failed=True, scheduler=scheduler, say=say, share=share)
        return
    if any(stage.name == "extract" for stage in stages):
        from .template_checks import template_warnings

        for warning in template_warnings(loaded):
            err.print(f"kava: warning: {warning}", style="yellow", markup=False)
    _make(stages, force, scheduler, share)


def _make(stages: Any, force: frozenset[str], scheduler: str | None, share: Share = ALL) -> None:
    from ..train.ranks import Ranks
    from .make import run_stages

    trains = any(stage.name == "train" for stage in stages)
    _one_process({stage.name for stage in stages} - {"train"}, share)
    use_cpu = any(stage.run.recipe.train.arguments.get("use_cpu") for stage in stages)
    ranks = Ranks.join(use_cpu=use_cpu) if trains and share.world_size == 1 else Ranks()
    try:
        run_stages(stages, force=force, scheduler=scheduler, share=share, say=say, ranks=ranks)
    except KavaError as error:
        if not error.agreed:
            raise
        if ranks.is_first:
            _tell(str(error), error)
        # torchrun ends the others as soon as one has ended: not before it was told why.
        ranks.wait()
        sys.exit(error.exit_code)
    ranks.leave()


def _one_process(stages: set[str], share: Share) -> None:
    """Several processes train one student; what else they would do, each would do on its own, in the others' way."""
    from ..train.ranks import num_processes

    if stages and num_processes() > 1 and share.is_all:
        raise StageError(
            f"torchrun is for kava train: {', '.join(sorted(stages))} would run {num_processes()} times; run it alone "
            "first, or split it with --rank auto"
        )


def _teachers(loaded: Any, only: str | None) -> list[str]:
    if only is not None:
        loaded.teacher(only)
    return [only] if only is not None else list(loaded.recipe.teachers)


def _report(loaded: Any, teacher: str | None, scheduler: str | None) -> None:
    from .report.projection import make_report, report_stages, report_table

    names = _teachers(loaded, teacher)
    _make([s for s in report_stages(loaded) if s.teacher is None or s.teacher in names], frozenset(), scheduler)
    for name in names:
        found = make_report(loaded, name)
        numbers, picture = found.save(loaded.projector_path(name))
        out.print()
        out.print(f"{name}: {found.source} -> {found.target}", markup=False)
        if not found.measured:
            out.print("not captured yet, nothing is measured")
        elif not found.is_saved:
            out.print("not saved: the targets that are there were made with another projector, and so are its files")
        if problem := found.attention.get("problem"):
            out.print(f"attention is not measured: {problem}", markup=False)
        print_table(report_table(found))
        out.print(f"{numbers}\n{picture}", markup=False)


def _quiet_libraries() -> None:
    """Libraries talk of their own matters on stderr; a user who wants that says `--verbose`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
