"""Fisher matrices over a corpus, with the flags of the published toolkit's script; see --help."""

import sys

from fisher_ray.cli import reference_main

if __name__ == "__main__":
    sys.exit(reference_main())
