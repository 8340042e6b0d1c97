"""Tables of restaurants, with texts."""
