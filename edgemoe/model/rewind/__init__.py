"""Taking drafted tokens back in families whose layers keep a state: states a token, mixers token by token."""
