"""`python -m fastcifar`, as torchrun wants it."""

from fastcifar.cli import main

main()
