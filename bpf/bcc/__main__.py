"""The helper of engine bcc: compiles, attaches, and stays.

Started by `weighbridge-probes load --engine bcc`, which has made the maps.

Run by the distribution's python3, for its bcc: nothing but the standard library is used besides.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from pathlib import Path

import host
from compiler import Refused
from engine import Engine, say
from notify import notify
from pins import Pins, remove_unfinished
from records import ENGINE_BCC, HAS_LIFECYCLE, HAS_NETWORK, About

_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_LOOK_SECONDS = 1.0


def main() -> int:
    options = _options()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        _require(options.for_tests_only_accept_foreign_headers)
        engine = Engine(
            Pins(options.set),
            options.cgroup_root,
            options.verbose,
            options.for_tests_only_hold_tracepoints,
        )
        has = engine.load()
        about = engine.pins.write_about(has, options.version)
    except (Refused, OSError) as error:
        say(f"engine bcc: {error}")
        remove_unfinished(options.set)
        return 1
    # From here on others may change the set; that a helper is there the lock on the set itself still tells.
    os.close(options.lock)
    status = (
        f"engine bcc version {options.version}: lifecycle {_yes(has & HAS_LIFECYCLE)},"
        f" network {_yes(has & HAS_NETWORK)}, walk none"
    )
    if engine.held:
        status += "; births and ends are seen as long as this process runs"
    say(status)
    notify("READY=1", f"STATUS={status}")
    _stay(engine, about)
    notify("STOPPING=1")
    return 0


def _require(accept_foreign_headers: bool) -> None:
    """All that is missing is said at once."""
    release = platform.release()
    lacks = [host.without_bcc(), None if accept_foreign_headers else host.without_headers(release)]
    if any(lacks):
        raise Refused("; ".join(lack for lack in lacks if lack))


def _stay(engine: Engine, ours: About) -> None:
    """Until told to end, or somebody unloaded or replaced the set."""
    while signal.sigtimedwait(_SIGNALS, _LOOK_SECONDS) is None:
        there = engine.pins.about()
        if there is None or (there.engine, there.load_id) != (ENGINE_BCC, ours.load_id):
            say("the programs were unloaded or replaced, so the helper ends")
            return
        if engine.missed is not None and (missed := engine.missed.look()):
            say(f"the kernel kept {missed} events from the programs: a BPF program was interrupted")
    if engine.held:
        # Coverage is to say so while nobody listens. Agents look again where the time has changed.
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        engine.pins.change_about(ours._replace(has=ours.has & ~HAS_LIFECYCLE, programs_boottime_ns=now))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--set", type=Path, required=True, help="directory of the pins")
    parser.add_argument("--cgroup-root", type=Path, required=True, help="mount point of the v2 hierarchy")
    parser.add_argument("--version", required=True)
    parser.add_argument(
        "--lock", type=int, required=True, help="descriptor to close when the set is complete"
    )
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--for-tests-only-accept-foreign-headers", action="store_true")
    parser.add_argument("--for-tests-only-hold-tracepoints", action="store_true")
    return parser.parse_args()


def _yes(bit: int) -> str:
    return "yes" if bit else "no"


if __name__ == "__main__":
    sys.exit(main())
