"""`python -m cosmos_runtime.cli`, the same as `cosmos-run`."""

from cosmos_runtime.cli import main

main(prog_name="cosmos-run")
