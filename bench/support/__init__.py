"""What measurements share: checkpoints, workloads, links, memory limits."""
