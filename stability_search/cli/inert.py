"""Strings of users, tasks and machines are hostile until a terminal cannot act on them."""


def inert(text: str, *, keeps_lines: bool = False) -> str:
    r"""Spell out every character a terminal could act on.

    Args:
        text: Any string, lone surrogates included.
        keeps_lines: True leaves line feeds as they are, for text of several lines.

    Returns:
        The same text with control, direction and other invisible characters as backslash
        escapes. It can be encoded as UTF-8.

    Example:
        >>> print(inert("a\x1b[31mb\r\n"))
        a\x1b[31mb\r\n
    """
    if text.isprintable():  # nearly always, and much cheaper than the loop
        return text
    return "".join(
        character
        if character.isprintable() or (keeps_lines and character == "\n")
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
