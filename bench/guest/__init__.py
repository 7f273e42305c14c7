"""How edgemoe behaves beside other programs, broken files and callers that change their minds."""
