"""The page of commands, made of the `dlrm` command itself: an option that is added is on the page.

In: the app of torchdlrm/cli/main.py.  Out: Markdown.
"""

import re

from torchdlrm.cli.main import app

_ABOUT = """# Commands

Every command takes `--json`, which prints one JSON object on standard output (tables and progress bars go to standard
error), and `--help`. Exit code 0 means success, 2 that the input is wrong (the message says where, and what to do), 130
that the command was interrupted, 1 any other error. `dlrm help train` shows in a terminal what this page shows, and
`source <(dlrm completion bash)` completes commands and options (`zsh` and `fish`, too).
"""


def commands_page() -> str:
    """Every command with its arguments and options."""
    text = app.generate_docs(output_format="markdown")
    _, _, text = text.partition("\n**Commands**:\n")
    overview, _, commands = text.partition("\n## ")
    # A usage that a command of ours gives has its name twice.
    commands = re.sub(r"^(dlrm (?:\w+ )*)(\w+) \2 ", r"\1\2 ", f"## {commands}", flags=re.MULTILINE)
    commands = re.sub(r"\n {4}(?=[^\s*])", " ", commands)  # a line of a list goes on
    return "\n".join([_ABOUT, overview.strip().replace("* [", "- ["), "", _options(commands), ""])


def _options(text: str) -> str:
    """Arguments and options as a list that shows where each begins."""
    text = re.sub(r"^\* (`[^`]+`)(: )?", r"- **\1** ", text, flags=re.MULTILINE)
    return text.replace("**Parameters**:", "**Options**").replace("**Arguments**:", "**Arguments**")
