"""Entry point of `python -m fastcifar`, which torchrun uses."""

from fastcifar.cli.app import main

main()
