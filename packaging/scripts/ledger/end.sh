# shellcheck shell=sh
# With the ledger its timer stops, and a comparison that runs.
end() {
    systemctl disable --now weighbridge-ledger.service weighbridge-reconcile.timer || true
}
