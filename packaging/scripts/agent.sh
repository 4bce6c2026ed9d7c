# shellcheck shell=sh disable=SC2034
part=agent
user=weighbridge

# The new programs take over the counters of the old ones; then the new agent takes over the spool.
hand_over() {
    if systemctl -q is-active weighbridge-probes.service; then
        systemctl reload weighbridge-probes.service
    elif weighbridge-probes status >/dev/null 2>&1; then
        weighbridge-probes upgrade
    fi || echo "weighbridge-agent: the kernel probes were not handed over: weighbridge-probes upgrade says why" >&2
    systemctl try-restart weighbridge-agent.service || true
}

# The agent first: it takes a last reading, from the probes too.
end() {
    systemctl disable --now weighbridge-agent.service || true
    systemctl disable --now weighbridge-probes.service || true
    weighbridge-probes unload || true
    umount /run/weighbridge/bpf 2>/dev/null || true
}
