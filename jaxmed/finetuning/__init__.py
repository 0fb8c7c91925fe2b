"""Fine-tuning: adapters and all parameters, on prompts with responses, with optax and our own decoder."""
