"""File formats, checkpoints, several GPUs, measuring, the command line: see docs/house.md."""
