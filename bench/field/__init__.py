"""What public reports about other engines describe, tried here."""
