"""
A part of a page that a script writes: it stands between two comments with its name.
"""
import difflib


def with_part(page, script, content):
    """The text of a page, with `content` in the part that `script` makes.

    Raises ValueError if the page does not have that part just once.
    """
    begin, end = f"<!-- made by {script} -->\n", f"<!-- end of what {script} made -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return before + begin + content + end + after


def differences(old, new, name):
    """The lines in which the text of a page differs from what it should be; [] if in none."""
    texts = (text.splitlines(keepends=True) for text in (old, new))
    return list(difflib.unified_diff(*texts, name, "the results"))
