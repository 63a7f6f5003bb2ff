"""Running stages for a command: the preflight, the processes that take part, and the recipe that is saved."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from typing import Any

from ..errors import BrokenRecipeError, KavaError, RecipeError, StageError
from .cli_store import err, out, print_table, say
from .cluster.share import ALL, Share


def plan_run(
    loaded: Any,
    chosen: list[str],
    *,
    sample: int | None = None,
    probe: bool = False,
    teacher: str | None = None,
    scheduler: str | None = None,
    as_json: bool = False,
    fits: bool = True,
) -> None:
    """Print what a run would take, as far as it can be told; then refuse it if the recipe is broken.

    Args:
        loaded: the run.
        chosen: names of the stages.
        sample: number of samples whose tokens are counted; None for all.
        probe: whether to run every stage on a few samples.
        teacher: the only teacher; None for all.
        scheduler: the value of `--scheduler`.
        as_json: whether to print for programs.
        fits: whether to refuse a run that needs more room than there is.

    Raises:
        BrokenRecipeError: with every problem of the recipe.
        StageError: if the run does not fit.
    """
    import json

    from ..notices import notices_held
    from .commands.plan import print_plan
    from .plan import make_plan
    from .plan.show import describe
    from .preflight import Scope, find_problems

    with notices_held():
        problems = find_problems(Scope(loaded, frozenset(chosen), teacher, scheduler, planning=True))
        if problems and probe:
            raise BrokenRecipeError(*problems)
        plan = make_plan(loaded, sample=sample, probe=probe, teachers=None if teacher is None else [teacher])
        plan.broken = [*problems, *plan.broken]
        if as_json:
            out.print_json(json.dumps(describe(plan)))
        else:
            print_plan(plan, chosen, out)
        if plan.broken:
            raise BrokenRecipeError(*plan.broken)
        if fits and plan.refusals:
            raise StageError("does not fit: " + "; ".join(plan.refusals))


def run_named(
    loaded: Any,
    names: list[str],
    force: frozenset[str],
    scheduler: str | None,
    teacher: str | None = None,
    share: Share = ALL,
    only_failed: bool = False,
    *,
    always_save: bool = False,
) -> None:
    """Run the stages of these names.

    Args:
        loaded: the run.
        names: of the stages.
        force: names of stages whose output is rebuilt.
        scheduler: the value of `--scheduler`.
        teacher: the only teacher; None for all.
        share: the share of the parts that this process makes.
        only_failed: whether to capture only failed samples again.
        always_save: whether to save the recipe also if nothing was left to be made.

    Raises:
        BrokenRecipeError: if the preflight refuses the recipe.
        RecipeError: if the recipe has no such stage, or options exclude each other.
    """
    from .saved_recipe import save_recipe
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

        check_recipe(loaded, names, scheduler, teacher)
        for stage in stages:
            if isinstance(stage, StoreStage):
                repair_stage(stage, failed=True, scheduler=scheduler, say=say, share=share)
        save_recipe(loaded)
        return
    make(stages, force, scheduler, share, teacher=teacher, always_save=always_save)


def check_recipe(loaded: Any, names: list[str], scheduler: str | None, teacher: str | None) -> None:
    """Refuse a broken recipe, then print warnings about one that is probably not meant.

    Raises:
        BrokenRecipeError: with every problem.
    """
    from ..notices import print_later
    from .preflight import Scope, refuse_broken
    from .template_checks import template_warnings

    try:
        refuse_broken(Scope(loaded, frozenset(names), teacher, scheduler))
    except BrokenRecipeError:
        with suppress(KavaError):  # They need the corpus, which may be one of the problems.
            for warning in template_warnings(loaded) if "extract" in names else []:
                print_later(f"kava: warning: {warning}")
        raise
    for warning in template_warnings(loaded) if "extract" in names else []:
        err.print(f"kava: warning: {warning}", style="yellow", markup=False)


def make(
    stages: list[Any],
    force: frozenset[str],
    scheduler: str | None,
    share: Share = ALL,
    *,
    teacher: str | None = None,
    always_save: bool = False,
) -> None:
    """Make what is missing of these stages; see `run_named`."""
    from ..train.ranks import Ranks
    from .make import run_stages
    from .saved_recipe import recipe_saved, save_recipe

    run, names = stages[0].run, [stage.name for stage in stages]
    trains = "train" in names
    _one_process({*names} - {"train"}, share)
    use_cpu = bool(run.recipe.train.arguments.get("use_cpu"))
    ranks = Ranks.join(use_cpu=use_cpu) if trains and share.world_size == 1 else Ranks()
    try:
        ranks.first(partial(check_recipe, run, names, scheduler, teacher))
        if always_save:
            save_recipe(run)
        with recipe_saved(run) as on_make:
            options: dict[str, Any] = {"on_make": on_make} if ranks.is_first else {}
            run_stages(stages, force=force, scheduler=scheduler, share=share, say=say, ranks=ranks, **options)
        if always_save and ranks.is_first:
            save_recipe(run)
    except KavaError as error:
        if not error.agreed:
            raise
        if ranks.is_first:
            tell(error)
        # torchrun ends the others as soon as one has ended: not before it was told why.
        ranks.wait()
        sys.exit(error.exit_code)
    ranks.leave()


def tell(error: BaseException, message: str = "") -> None:
    """Print an error in red, then the notices that were held back for it."""
    from ..notices import print_held

    if os.environ.get("KAVA_VERBOSE"):
        import traceback

        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")
    prefix = "kava" if rank == "0" else f"kava: rank {rank}"
    for line in error.problems if isinstance(error, BrokenRecipeError) else [message or str(error)]:
        err.print(f"{prefix}: {line}", style="red", markup=False)
    print_held()


def teachers_of(loaded: Any, only: str | None) -> list[str]:
    """Return the names of the teachers that a command is about."""
    if only is not None:
        loaded.teacher(only)
    return [only] if only is not None else list(loaded.recipe.teachers)


def report_projection(loaded: Any, teacher: str | None, scheduler: str | None) -> None:
    """Fit, measure and draw projectors; print a table for each teacher."""
    from .found_recipe import find_recipe
    from .report.projection import make_report, report_stages, report_table
    from .saved_recipe import save_recipe

    names = teachers_of(loaded, teacher)
    stages = [s for s in report_stages(loaded) if s.teacher is None or s.teacher in names]
    make(stages, frozenset(), scheduler, teacher=teacher)
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
    if find_recipe(loaded.root) is None:  # A report of other settings leaves the recipe of the outputs alone.
        save_recipe(loaded)


def _one_process(stages: set[str], share: Share) -> None:
    """Several processes train one student; what else they would do, each would do on its own, in the others' way."""
    from ..train.ranks import num_processes

    if stages and num_processes() > 1 and share.is_all:
        raise StageError(
            f"torchrun is for kava train: {', '.join(sorted(stages))} would run {num_processes()} times; run it alone "
            "first, or split it with --rank auto"
        )
