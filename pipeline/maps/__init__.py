"""The maths of the offline pass: time, layers, heads and width; fitted on streamed sums."""
