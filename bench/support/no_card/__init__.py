"""What stands in for a card on a machine without one."""
