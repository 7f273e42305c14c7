"""A device that is no card, and an engine on it: for schedules that a seed chooses and that can be run again."""
