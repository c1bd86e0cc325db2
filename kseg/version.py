"""The version of kseg, alone in its file so that building a wheel imports nothing else."""

VERSION = "0.1.0"
