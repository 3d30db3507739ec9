"""`make verify`: the artefacts of a checkpoint beside the checkpoint run in PyTorch."""
