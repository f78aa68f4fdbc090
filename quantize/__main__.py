"""`python -m quantize` is `labelfree`."""

from quantize.cli import main

main()
