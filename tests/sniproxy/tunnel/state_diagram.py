"""The transition tables of a stream's state as text, for the module's docstring and PROTOCOL.md.

python -m tests.sniproxy.tunnel.state_diagram           prints it
"""

from collections.abc import Iterator

from sniproxy.tunnel.state import TRANSITIONS, Direction, Machine, Opening, Side


def diagram() -> str:
    """Return the states of each machine: for each side the allowed capsules, and the next state if it is another one."""
    return "\n".join(line for name, machine in TRANSITIONS.items() for line in (name, *_states(machine)))


def _states(machine: Machine[Opening] | Machine[Direction]) -> Iterator[str]:
    for state, events in machine.items():
        shown = str(state)
        for side in Side:
            said = [
                event[1].name + ("" if isinstance(event[1], int) else " on the second connection") + leads
                for event, after in events.items()
                if event[0] is side
                for leads in ["" if after is state else f" → {after}"]
            ]
            if said:
                yield f"  {shown:<9} {side.value + ':':<8} {', '.join(said)}"
                shown = ""
        if not events:
            yield f"  {shown:<9} nothing"


if __name__ == "__main__":
    print(diagram())
