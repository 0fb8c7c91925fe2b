"""Every tolerance of the test suite, absolute, in the unit of what is compared."""

LOGITS = 2e-4  # default model against transformers, float32
TINY_LOGITS = 1e-5  # tiny models against transformers, float32
EFFECTS = 1e-4  # exact engine against naive full-forward patching, float32
RESIDUAL = 1e-4  # residual identities
TINY_SITES = 1e-5  # sites of tiny models against transformers, relative to the largest value where that exceeds one
EXACT = 0.0
PADDED = 2e-5  # a row alone against the row beside another one: two orders of float32 sums, on logits of about 7
