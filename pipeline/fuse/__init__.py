"""Several teachers as one: weights, what is the same for all samples, a read-time view, the stage."""
