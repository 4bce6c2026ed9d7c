# shellcheck shell=sh disable=SC2154
forget_compiled() {
    rm -rf "/var/cache/weighbridge/$part"
    rmdir /var/cache/weighbridge 2>/dev/null || true
    if systemd_runs; then systemctl daemon-reload || true; fi
}
