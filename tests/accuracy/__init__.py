"""What each setting and each method costs in accuracy, on real models."""
