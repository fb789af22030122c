"""`python -m tests.bench`: kernels against torch, or with `--table` against the machine."""

import sys

from tests.bench import kernels, table

(table if "--table" in sys.argv else kernels).main()
