"""Whether our numbers are the reference's: site by site against transformers or a stored file, and a self-check in seconds."""
