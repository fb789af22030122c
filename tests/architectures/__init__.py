"""Every architecture that transformers ships: one tiny random model each, rotated and compared."""
