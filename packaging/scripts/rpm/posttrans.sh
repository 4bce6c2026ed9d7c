# shellcheck shell=sh
# When the old package's files are gone: a new daemon must not find modules of both.
if systemd_runs; then hand_over; fi
