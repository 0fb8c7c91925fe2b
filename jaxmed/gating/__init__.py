"""From a table of single effects to a verdict: does a small group of a layer's neurons decide, and is it a gate?"""
