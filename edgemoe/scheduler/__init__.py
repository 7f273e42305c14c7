"""Many requests on one model: admission, chunked prefill, prefix cache, preemption, the step."""
