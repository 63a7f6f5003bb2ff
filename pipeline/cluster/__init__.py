"""Many processes on one run: which parts each of them makes, and what a batch system tells of it."""

from .share import ALL, Share, parse_parts

__all__ = ["ALL", "Share", "parse_parts"]
