"""Outcomes of generated text: how prompts are answered while sets of units are patched, judged, with paired intervals."""
