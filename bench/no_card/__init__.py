"""What the path of a card does, measured on a machine without one."""
