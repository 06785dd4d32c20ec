# SPDX-License-Identifier: Apache-2.0
"""What other libraries' errors become in our messages."""


def first_line(error: BaseException) -> str:
    """Kind and first line of an error; some go on for pages, some say nothing.

    Args:
        error (BaseException): The error.

    Returns:
        str: E.g. "ValueError: no such layer".
    """
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
