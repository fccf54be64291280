"""One study: what is tried, on which machines, what is kept, and what it proves."""
