"""`python -m tests.bench`: kernels against torch."""

from tests.bench.kernels import main

main()
