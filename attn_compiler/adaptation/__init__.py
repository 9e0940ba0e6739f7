"""Models under policies that add parameters to them: made, saved, loaded, and trained to match what the model was."""
