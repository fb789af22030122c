"""One real language model, every recipe, one table: `python -m examples.demo`."""
