# shellcheck shell=sh
hand_over() {
    systemctl daemon-reload || true
    systemctl try-restart weighbridge-ledger.service || true
}
