"""The parts of `python -m tools.benchmark`, one file each."""
