"""What studies share: Markdown tables."""


def markdown(head, rows):
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]
