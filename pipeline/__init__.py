"""The recipe, the offline transforms, the stages and the command line.

`recipe` is the one YAML file; `run` knows where everything of a recipe lies and what it should hold; `stages` says
what is done, stale or missing, and does it; `maps`, `select` and `fuse` are the maths; `transform` and the stages
apply it part by part under dask; `commands` and `report` are what the command line tells of it.
"""

from .maps.project import fit_projector
from .maps.projector import Projector
from .maps.resample import RESAMPLERS, TimeMap
from .recipe import Recipe, load_recipe

__all__ = ["RESAMPLERS", "Projector", "Recipe", "TimeMap", "fit_projector", "load_recipe"]
