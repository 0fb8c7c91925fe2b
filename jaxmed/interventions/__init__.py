"""The contract a model is written against: named sites, edits as data, and kinds of edits."""
