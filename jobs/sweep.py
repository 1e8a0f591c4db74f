"""Many runs from one file, with a table of them all; see --help."""

import sys

from fisher_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
