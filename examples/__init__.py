"""Programs that use edgemoe."""
