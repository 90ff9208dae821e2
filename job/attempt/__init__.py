"""The stages of one attempt at a run, in the order in which `job.app` goes through them."""
