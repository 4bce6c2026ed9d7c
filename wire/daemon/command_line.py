"""What both programs do alike around a command: errors for people on standard error, exit codes."""

from __future__ import annotations

import argparse
import sys

from wire.daemon.control import ControlError
from wire.daemon.local_port import LocalPortError
from wire.daemon.settings import SettingsError


def run_command(parser: argparse.ArgumentParser, own_error: type[Exception]) -> int:
    """Parse the arguments and call their `handler`; 0 is success, 1 a finding, 2 wrong usage or settings."""
    args = parser.parse_args()
    try:
        return int(args.handler(args))
    except (own_error, SettingsError, LocalPortError, ControlError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output has seen enough; nothing is left to flush into its closed pipe.
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130
