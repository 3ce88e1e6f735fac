"""Training, checkpoints, run folders and evaluation; modules and loaders come in as arguments."""
