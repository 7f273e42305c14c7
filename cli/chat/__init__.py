"""`edgemoe chat`: the conversation, its commands and the terminal loop."""
