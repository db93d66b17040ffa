"""What `dlrm doctor` finds: facts of the machine, what will be used, and checks that worked or did not."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

AFRESH = "install afresh, in a new venv: make install, or make install EXTRA=gpu where there are GPUs"

Outcome = Literal["ok", "failed", "not run"]


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: what was tried.
        outcome: whether it worked; `not run` where it needs something that did not.
        told: what was seen, or why it failed.
        remedy: what to do; empty where it worked.
        seconds: that it took; None where that means nothing.
    """

    name: str
    outcome: Outcome
    told: str = ""
    remedy: str = ""
    seconds: float | None = None


@dataclass
class Diagnosis:
    """All that was found.

    Attributes:
        machine: facts of hardware and system, by name.
        packages: versions of what computes, by name of the distribution; None where it is not installed.
        uses: what torchdlrm will use by default, by name.
        checks: in the order in which they were made.
    """

    machine: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str | None] = field(default_factory=dict)
    uses: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """What did not work."""
        return [check for check in self.checks if check.outcome == "failed"]

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {"works": not self.failed, **asdict(self)}
