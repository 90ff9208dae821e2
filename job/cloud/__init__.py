"""AWS Batch: the stack, submitting jobs, watching them; knows nothing of torch."""
