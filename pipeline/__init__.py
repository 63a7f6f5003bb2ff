"""The recipe, the offline transforms, the stages and the command line.

`recipe` is the one YAML file; `run` knows where everything of a recipe lies and what it should hold; `stages` says
what is done, stale or missing, and does it; `resample`, `layers`, `heads`, `project`, `select` and `fuse` are the
maths; `transform`, `select_stage` and `fuse_stage` apply it part by part under dask.
"""

from .project import fit_projector
from .projector import Projector
from .recipe import Recipe, load_recipe
from .resample import RESAMPLERS, TimeMap

__all__ = ["RESAMPLERS", "Projector", "Recipe", "TimeMap", "fit_projector", "load_recipe"]
