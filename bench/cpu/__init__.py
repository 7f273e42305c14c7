"""What one machine's CPU does: kernels, and llama.cpp beside edgemoe on the same files."""
