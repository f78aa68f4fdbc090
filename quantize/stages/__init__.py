"""The stages: weights, renorm, activations."""
