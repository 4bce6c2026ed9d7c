# shellcheck shell=sh
if [ "$1" = configure ]; then
    prepare
    if systemd_runs; then
        systemctl daemon-reload || true
        hand_over
    fi
fi
