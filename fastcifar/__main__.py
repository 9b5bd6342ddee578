"""`python -m fastcifar`, as torchrun wants it."""

from fastcifar.cli.app import main

main()
