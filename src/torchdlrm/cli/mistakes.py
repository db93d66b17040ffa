"""What is wrong with a command line, in one line like every other error.

The parser's own words name `--rows` where nobody has typed it, and take a mistyped option for a value.
"""

import difflib
import re

from cyclopts.exceptions import CycloptsError, MissingArgumentError


def describe_mistake(error: CycloptsError) -> str:
    """Which command, which argument or option, and what was perhaps meant."""
    error.verbose = False
    command = " ".join(["dlrm", *(error.command_chain or ())])
    argument = error.argument
    if not isinstance(error, MissingArgumentError) or argument is None or error.keyword or argument.tokens:
        return re.sub(r'^Command ".*?" parameter ', "", str(error))
    option = argument.name
    if argument.index is not None and not argument.field_info.is_keyword_only:
        return f"{command}: {option.removeprefix('--').upper()} is missing; {command} --help shows how it is called"
    typed = [token for token in error.root_input_tokens or () if token.startswith("--") and "." not in token]
    close = difflib.get_close_matches(option, typed, n=1, cutoff=0.7)
    hint = f"; did you mean it by {close[0]}?" if close else f"; {command} --help shows all options"
    return f"{command}: {option} is missing{hint}"
