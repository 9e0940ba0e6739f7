"""A variant and a schedule into something that runs on one kind of machine."""
