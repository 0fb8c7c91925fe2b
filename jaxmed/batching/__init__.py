"""Examples into batches, losses of responses, and scores of given responses: what fine-tuning, pruning and evaluation share."""
