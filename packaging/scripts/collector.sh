# shellcheck shell=sh disable=SC2034
part=collector
user=weighbridge-collector

hand_over() {
    systemctl try-restart weighbridge-collector.service || true
}

end() {
    systemctl disable --now weighbridge-collector.service || true
}
