"""What to quantize (schemes, as data) and how (numeric kernels, calibration, sensitivity)."""
