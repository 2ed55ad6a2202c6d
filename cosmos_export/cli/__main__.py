"""`python -m cosmos_export.cli`, the same as `cosmos-export`."""

from cosmos_export.cli import main

main(prog_name="cosmos-export")
