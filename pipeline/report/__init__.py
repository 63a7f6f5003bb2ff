"""How good a run is, in numbers and pictures."""
