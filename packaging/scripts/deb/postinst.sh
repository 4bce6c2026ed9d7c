# shellcheck shell=sh
if [ "$1" = configure ]; then
    prepare
    if systemd_runs; then hand_over; fi
fi
