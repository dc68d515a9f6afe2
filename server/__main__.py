"""`python -m server` is the `multilora` command."""

from server.cli import main

main()
