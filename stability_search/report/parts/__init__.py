"""The parts of the page, a file each; a part turns a `View` into a `Section` or a card."""
