# shellcheck shell=sh
end() {
    systemctl disable --now weighbridge-collector.service || true
}
