"""`python -m weakseg`, the same as the console command."""

import sys

from weakseg.command import main

if __name__ == "__main__":
    sys.exit(main())
