"""Other quantization tools on the same model, the same calibration data and the same tokens."""
