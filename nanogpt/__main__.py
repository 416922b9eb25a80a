"`python -m nanogpt` is the same as `nanogpt`; torchrun starts it this way."
import sys

from nanogpt.cli import main

if __name__ == "__main__": sys.exit(main())
