"""What the commands' options have in common: how they are read, told of in the help, and corrected."""
