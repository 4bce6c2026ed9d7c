# shellcheck shell=sh
# The agent first: it takes a last reading, from the probes too.
end() {
    systemctl disable --now weighbridge-agent.service || true
    systemctl disable --now weighbridge-probes.service weighbridge-probes-bcc.service || true
    weighbridge-probes unload || true
    systemctl stop run-weighbridge-bpf.mount || true
}
