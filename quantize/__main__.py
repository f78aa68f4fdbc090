"""``python -m quantize`` is ``labelfree``."""

from quantize.cli import main

if __name__ == "__main__":
    main()
