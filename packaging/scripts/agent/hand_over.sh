# shellcheck shell=sh
# The new programs take over the counters of the old ones; then the new agent takes over the spool. The helper of engine bcc
# is such a program itself.
hand_over() {
    systemctl daemon-reload || true
    if systemctl -q is-active weighbridge-probes.service; then
        systemctl reload weighbridge-probes.service
    elif systemctl -q is-active weighbridge-probes-bcc.service; then
        systemctl restart weighbridge-probes-bcc.service
    elif weighbridge-probes status >/dev/null 2>&1; then
        weighbridge-probes upgrade
    fi || echo "weighbridge-agent: the kernel probes are still the old ones: weighbridge-probes upgrade says why" >&2
    systemctl try-restart weighbridge-agent.service || true
}
