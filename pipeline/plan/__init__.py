"""What a run will take, before it is begun: `kava plan`, and what `kava run --dry-run` says of sizes."""

from .plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
