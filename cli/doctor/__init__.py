"""What is looked at by `edgemoe doctor`."""
