"""The model that ships with edgemoe, the tasks it was trained for, and where its checkpoint lies."""
