"""Run Mixture-of-Experts language models that are larger than the device they run on."""
