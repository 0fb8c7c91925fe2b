"""What every run has: a folder, a cost, a progress, and a record of what computed it."""
