"""What several processes do once for each storage: all nodes may share one, and each may have its own.

Rank 0 goes first, then the first process of every other node, which finds the work done where the storage is shared. All
processes take part, and all hear what went wrong anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        first: Whether it is rank 0.
        first_of_node: Whether it is the one that looks at its node's storage.
        gather: What every process holds, in the order of the ranks: a collective.
    """

    first: bool = True
    first_of_node: bool = True
    gather: Callable[[Any], list[Any]] = _alone

    def once_for_each_storage(self, action: Callable[[], None]) -> list[str]:
        """Have `action` done, which does nothing where it finds itself done; what went wrong.

        Args:
            action: May raise OSError or ValueError.
        """
        wrong = self.gather(_said(action) if self.first else None)
        wrong += self.gather(_said(action) if self.first_of_node and not self.first else None)
        return [said for said in wrong if said is not None]

    def on_every_node(self, action: Callable[[], None]) -> list[str]:
        """Have `action` done by one process of each node, all at once; what went wrong."""
        wrong = self.gather(_said(action) if self.first_of_node else None)
        return [said for said in wrong if said is not None]

    def together(self, look: Callable[[], list[str]]) -> list[str]:
        """What one process of each node sees, each thing once."""
        seen = self.gather(look() if self.first_of_node else [])
        return list(dict.fromkeys(one for some in seen for one in some))


def _said(action: Callable[[], None]) -> str | None:
    try:
        action()
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return None
