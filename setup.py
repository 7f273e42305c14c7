"""The description on a package index, where no file of the checkout is; setup.cfg has all else."""

import re
from pathlib import Path

from setuptools import setup

RELATIVE = re.compile(r"!?\[([^\]]*)\]\((?![a-z]+:)[^)]*\)")
"""A link or a picture whose target is a file of the checkout, or a heading of the page."""
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def long_description(readme: str) -> str:
    """The README with the texts of such links alone, and without such pictures."""
    parts = FENCE.split(readme)
    parts[::2] = [RELATIVE.sub(lambda link: "" if link[0][0] == "!" else link[1], part) for part in parts[::2]]
    return "".join(parts) + "\nThe pages that are named here are in the folder `docs` of the source distribution.\n"


setup(
    long_description=long_description((Path(__file__).parent / "README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
)
