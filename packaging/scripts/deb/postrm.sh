# shellcheck shell=sh
case $1 in
    remove)
        forget_compiled
        if systemd_runs; then systemctl daemon-reload || true; fi
        ;;
    purge) purge ;;
esac
