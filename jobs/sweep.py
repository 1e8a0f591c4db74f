"""Many runs from one file, with a table of them all; see --help."""

import sys

from fisher_ray.cli import sweep_main

if __name__ == "__main__":
    sys.exit(sweep_main())
