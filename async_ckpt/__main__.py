"""`python -m async_ckpt` is the command line."""

from .cli import main

main()
